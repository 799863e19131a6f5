"""What every model shares: a dataclass as configuration, presets by name, and weights as safetensors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from d2it.errors import UserError, reason_of
from d2it.files import atomic_write, read_json, read_sealed, save_tensors, sha256_of, write_sealed

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:  # a machine without it reads and writes local folders all the same

    class PyTorchModelHubMixin:  # type: ignore[no-redef]
        """Stands in where huggingface_hub is not installed: no `push_to_hub`, no download."""


CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
#: Arguments of `from_pretrained` for the Hugging Face hub.
HUB = ("local_files_only", "revision", "cache_dir", "force_download", "token")

M = TypeVar("M", bound="Model")


def pair(name: str, value: int | Iterable[int]) -> tuple[int, int]:
    """256 -> (256, 256); (height, width) stays.

    Raises:
        ValueError: neither; the message names the setting.
    """
    sides = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Iterable) else ()
    if len(sides) != 2 or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in sides):
        raise ValueError(f"{name} must be a side or (height, width), whole numbers above 0, got {value!r}")
    return (sides[0], sides[1])


def check_share(config: Any, *names: str) -> None:
    """Raises ValueError unless the named fields of a configuration are numbers in [0, 1]."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be in 0 ... 1, got {value!r}")


def check_whole(config: Any, **least: int) -> None:
    """Raises ValueError unless the named fields of a configuration are whole numbers of at least these values."""
    for name, bound in least.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ValueError(f"{name} must be a whole number of at least {bound}, got {value!r}")


def set_whole_tuples(config: Any, *names: str) -> None:
    """Turns the named fields of a configuration into tuples.

    Raises:
        ValueError: one that is not a non-empty sequence of whole numbers above 0.
    """
    for name in names:
        value = getattr(config, name)
        given = isinstance(value, (list, tuple)) and len(value) > 0
        if not given or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in value):
            raise ValueError(f"{name} must be a list of whole numbers above 0, got {value!r}")
        setattr(config, name, tuple(value))


class Pretrained(PyTorchModelHubMixin):
    """What is written to a folder, or to a repository of the Hugging Face hub. A subclass has `_save_pretrained`."""

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Writes config.json with the SHA-256 of its weights, and safetensors; each file whole or not at all.

        Keyword arguments are those of `huggingface_hub.ModelHubMixin.save_pretrained` and matter only with
        `push_to_hub=True`.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._save_pretrained(directory)
        if kwargs.pop("push_to_hub", False):
            return self.push_to_hub(repo_id=kwargs.pop("repo_id", None) or directory.name, **kwargs)
        return None


class Model(nn.Module, Pretrained):
    """Base of the trainable models. A subclass names its dataclass `Config` and its table of `presets`."""

    #: SHA-256 of the weights file that this model was last read from or written to.
    weights_sha256: str | None = None
    #: That of the VAE whose latents a transformer was trained on; saved with it.
    vae_sha256: str | None = None
    Config: ClassVar[type[Any]]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, self.Config):
            raise TypeError(f"config must be a {self.Config.__name__}, got {type(config).__name__}")
        self.config = config

    @classmethod
    def from_preset(cls: type[M], name: str, **overrides: Any) -> M:
        """A new model by the name of its preset; `overrides` are fields of `cls.Config`.

        Raises:
            ValueError: an unknown preset or field; the message lists the known ones.
        """
        return cls(cls.preset_config(name, **overrides))

    @classmethod
    def preset_config(cls, name: str, **overrides: Any) -> Any:
        """The configuration that `from_preset` would build."""
        if name not in cls.presets:
            raise ValueError(f"preset must be one of {', '.join(cls.presets)} for {cls.__name__}, got {name!r}")
        fields = {f.name for f in dataclasses.fields(cls.Config)}
        unknown = sorted(set(overrides) - fields)
        if unknown:
            raise ValueError(f"{cls.__name__} has no setting {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
        return cls.Config(**{**cls.presets[name], **overrides})

    # ---- weights -----------------------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with atomic_write(save_directory / WEIGHTS_FILE) as file:
            save_tensors(file, tensors, {"model": type(self).__name__})
            self.weights_sha256 = sha256_of(file)
        description = {
            "model": type(self).__name__,
            "config": dataclasses.asdict(self.config),
            "weights": self.weights_sha256,
            "vae": self.vae_sha256,
        }
        write_sealed(save_directory / CONFIG_FILE, description)

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        **kwargs: Any,
    ) -> M:
        """Reads the model that `save_pretrained` wrote, in evaluation mode.

        Folders of earlier versions have no hashes and are read with a warning.

        Args:
            pretrained_model_name_or_path: a local folder, or a repository of the Hugging Face hub ("user/model"),
                which is downloaded once and kept in the hub's cache.
            map_location: the device the weights are read to; they keep the dtype they were saved in.
            kwargs: settings that replace those in the file (`masked=True`, say), as long as they change no shape; and
                those of the hub: `local_files_only` (no network: a local folder, or a repository in the cache),
                `revision`, `cache_dir`, `force_download`, `token`.

        Raises:
            ValueError: no such folder, no model in it, one of another class or shape, or a file that is damaged.
        """
        hub = {name: kwargs.pop(name) for name in HUB if name in kwargs}
        return cls._read(local_folder(pretrained_model_name_or_path, cls.__name__, **hub), map_location, kwargs)

    @classmethod
    def _read(cls: type[M], path: str, map_location: str | torch.device, overrides: dict[str, Any]) -> M:
        if not os.path.isdir(path):
            raise ValueError(f"there is no folder {path!r} to read a {cls.__name__} from")
        description = cls._describe(path)
        config = cls._config(path, description, overrides)
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = os.path.join(path, WEIGHTS_FILE)
        try:
            found, wanted = sha256_of(file), description.get("weights")
            if wanted not in (None, found):
                raise ValueError(f"its SHA-256 is {found[:12]}..., not {wanted[:12]}...: damaged, or of another save")
            tensors = load_file(file, device=str(map_location))
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {reason_of(error)}") from error
        with torch.device("meta"):  # nothing is allocated or initialised that the file is about to replace
            model = cls(config)
        load_weights(model, tensors, source=path, assign=True)
        model.reset_buffers(torch.device(map_location))
        model.weights_sha256, model.vae_sha256 = found, description.get("vae")
        return model.eval()

    @classmethod
    def read_config(cls, path: str | Path, **overrides: Any) -> Any:
        """The configuration in the folder `path`; ValueError where it is missing or belongs to another model."""
        return cls._config(path, cls._describe(path), overrides)

    @classmethod
    def saved_hashes(cls, path: str | Path) -> tuple[str | None, str | None]:
        """Returns the SHA-256 of the weights and of their VAE's, as the configuration in `path` has them, or None."""
        description = cls._describe(path)
        return description.get("weights"), description.get("vae")

    @classmethod
    def _describe(cls, path: str | Path) -> dict[str, Any]:
        file = Path(path) / CONFIG_FILE
        description = read_sealed(file, {"model", "config", "weights", "vae"})
        if not isinstance(description.get("model"), str) or not isinstance(description.get("config"), dict):
            raise ValueError(f"{file} is not the configuration of a d2it model")
        if description["model"] != cls.__name__:
            raise ValueError(f"{path} holds a {description['model']}, not a {cls.__name__}")
        for key in ("weights", "vae"):
            if not isinstance(description.get(key), (str, type(None))):
                raise ValueError(f"{file}: {key} must be a SHA-256, got {description[key]!r}")
        return description

    @classmethod
    def _config(cls, path: str | Path, description: dict[str, Any], overrides: dict[str, Any]) -> Any:
        try:
            return cls.Config(**{**description["config"], **overrides})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{Path(path) / CONFIG_FILE} does not fit {cls.Config.__name__}: {error}") from error

    def reset_buffers(self, device: torch.device) -> None:
        """Computes again, on `device`, the buffers that follow from the configuration and are not saved."""

    # ---- blocks ------------------------------------------------------------------------------------------------

    def transformer_blocks(self) -> list[nn.Module]:
        """The units of compilation, activation checkpointing and sharding, in order of execution."""
        return []

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether every block is computed again in the backward pass instead of keeping its activations.

        It can be set at any time and is not part of the configuration.
        """
        return any(getattr(block, "recompute", False) for block in self.transformer_blocks())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for block in self.transformer_blocks():
            block.recompute = on  # type: ignore[assignment]

    def compile_blocks(self, **kwargs: Any) -> None:
        """torch.compile of every block in place: parameter names stay, equal blocks share the compiled code.

        Args:
            kwargs: as for `torch.compile`; `fullgraph=True` unless given.
        """
        kwargs.setdefault("fullgraph", True)
        blocks = self.transformer_blocks()
        # Dynamo counts the graphs of blocks of one class together, and those of an autoencoder all differ.
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 2 * len(blocks))
        for block in blocks:
            block.compile(**kwargs)

    def num_parameters(self) -> int:
        """Parameters as DiT counts them: with the frozen position embedding."""
        frozen = sum(b.numel() for name, b in self.named_buffers() if name.endswith("positions"))
        return sum(p.numel() for p in self.parameters()) + frozen


def local_folder(path: str | Path, what: str, **download: Any) -> str:
    """`path` where it is a folder, else that of the hub's repository of this name, downloaded unless it is cached.

    A `Path` is a folder and nothing else, and so is text that cannot name a repository (/absolute, or a/b/c).

    Raises:
        TypeError: an argument that is none of `HUB`.
        ValueError: no such repository.
    """
    if unknown := set(download) - set(HUB):
        raise TypeError(f"{what}.from_pretrained has no argument {min(unknown)!r}")
    if isinstance(path, Path) or os.path.isdir(path):
        return str(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(path, **download)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = reason_of(error)
        raise ValueError(f"there is no folder {path!r} to read a {what} from, nor can it be had: {reason}") from error


def saved_kind(path: str | Path, kinds: Sequence[type[M]]) -> type[M]:
    """Which of `kinds` the folder `path` holds; the first where its configuration cannot be read."""
    try:
        name = read_json(Path(path) / CONFIG_FILE).get("model")
    except UserError:
        name = None
    return next((kind for kind in kinds if kind.__name__ == name), kinds[0])


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str, assign: bool = False) -> None:
    """`model.load_state_dict(tensors, assign=assign)`; ValueError with one line where they do not fit."""
    own = model.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    extra = sorted(tensors.keys() - own.keys())
    shapes = sorted(k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape)
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({missing[0]}, ...)")
    if extra:
        problems.append(f"{len(extra)} of another model ({extra[0]}, ...)")
    if shapes:
        k = shapes[0]
        problems.append(f"{len(shapes)} of another shape ({k}: {tuple(tensors[k].shape)} for {tuple(own[k].shape)})")
    if problems:
        raise ValueError(f"the weights in {source} do not fit this {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(tensors, assign=assign)
