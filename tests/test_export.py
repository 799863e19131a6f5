"""`torch.export` of the content transformer and of the decoder: any batch size, saved, read again, equal."""

from pathlib import Path

import torch
from torch import Tensor

from d2it import DynamicContentTransformer, DynamicVAE

BATCH = torch.export.Dim("batch", min=2, max=64)


def assert_exports(model: torch.nn.Module, small: tuple[Tensor, ...], large: tuple[Tensor, ...], file: Path) -> None:
    program = torch.export.export(model, small, dynamic_shapes=tuple({0: BATCH} for _ in small))
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()
    for inputs in (small, large):
        torch.testing.assert_close(loaded(*inputs), model(*inputs))


def test_the_content_transformer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"image_size": 64, "dim": 64, "depth": 2, "heads": 2, "num_classes": 3}
    model = DynamicContentTransformer.from_preset("tiny", **small).eval()
    for parameter in model.parameters():  # the last layers are zero in a new model
        torch.nn.init.normal_(parameter, std=0.05)

    def inputs(batch: int) -> tuple[Tensor, ...]:
        x = torch.randn(batch, model.config.in_channels, *model.config.grid)
        t, y = torch.randint(0, 1000, (batch,)), torch.randint(0, 4, (batch,))
        return x, t, y, torch.randint(0, 2, (batch, *model.config.region_grid))

    with torch.no_grad():
        assert model(*inputs(2)).abs().max() > 0.01
        assert_exports(model, inputs(2), inputs(5), tmp_path / "content.pt2")


def test_the_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = DynamicVAE.from_preset("tiny").eval()

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return torch.randn(batch, vae.config.latent_channels, 8, 8), torch.randint(0, 2, (batch, 4, 4))

    with torch.no_grad():
        assert torch.equal(vae.decoder(*(given := inputs(2))), vae.decode(*given))
        assert_exports(vae.decoder, inputs(2), inputs(5), tmp_path / "decoder.pt2")
