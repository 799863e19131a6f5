"""The content transformer and the decoder as torch.export programs: saved, read again, run with another batch size.

python examples/export.py
"""

import tempfile
from pathlib import Path

import torch

from d2it import DynamicContentTransformer, DynamicVAE

BATCH = torch.export.Dim("batch", min=2, max=64)


def exported(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], file: Path) -> torch.nn.Module:
    """The model as a program for any batch size, by way of a file."""
    program = torch.export.export(model, inputs, dynamic_shapes=tuple({0: BATCH} for _ in inputs))
    torch.export.save(program, file)
    return torch.export.load(file).module()


if __name__ == "__main__":
    torch.manual_seed(0)
    content = DynamicContentTransformer.from_preset("tiny", image_size=64, num_classes=3).eval()
    vae = DynamicVAE.from_preset("tiny").eval()
    (height, width), (rows, columns) = content.config.grid, content.config.region_grid

    def inputs(batch: int) -> tuple[torch.Tensor, ...]:
        x, t = torch.randn(batch, 4, height, width), torch.randint(0, 1000, (batch,))
        return x, t, torch.randint(0, 3, (batch,)), torch.randint(0, 2, (batch, rows, columns))

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = exported(content, inputs(2), Path(folder) / "content.pt2")
        given = inputs(5)
        print(f"content transformer: equal {torch.allclose(program(*given), content(*given), atol=1e-5)}")
        decoder = exported(vae.decoder, (inputs(2)[0], inputs(2)[3]), Path(folder) / "decoder.pt2")
        z, grain_map = given[0], given[3]
        print(f"decoder: equal {torch.allclose(decoder(z, grain_map), vae.decode(z, grain_map), atol=1e-5)}")
