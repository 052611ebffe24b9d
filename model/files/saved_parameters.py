"""The parameters in a folder with a checkpoint, or with a model that transformers saved, of which one
is in memory at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.files import checkpoint_folder
from model.files.checkpoint import load_decoder
from model.files.hf import weight_files
from model.files.hf_config import read_shape
from model.files.tensor_contents import TensorContents, contents_in
from model.shapes import parameter_shapes


class SavedParameters(Mapping[str, Tensor]):
    """Parameters by name, in fp32, each read whenever it is asked for."""

    def __init__(self, stored: TensorContents, shapes: Mapping[str, Sequence[int]]) -> None:
        self._stored = stored
        self._shapes = shapes

    def __getitem__(self, name: str) -> Tensor:
        read = self._stored.whole({name: self._shapes[name]})
        return read[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def saved_parameters(folder: Path) -> Mapping[str, Tensor]:
    """Returns the parameters in fp32, in the model's order. Where the files have other names or
    shapes than the model, as older versions of transformers and mixtures of experts have them, all
    are loaded at once. Raises as `load_decoder` does."""
    shapes = parameter_shapes(read_shape(folder))
    stored = _stored(folder)
    if stored is not None and stored.holds(shapes):
        return SavedParameters(stored, shapes)
    return dict(load_decoder(folder, verify=False).named_parameters())


def _stored(folder: Path) -> TensorContents | None:
    """Returns the tensors in a folder; None where one cannot be read so."""
    if checkpoint_folder.StoredModel(folder).is_of_transformers:
        files = [path.name for path in weight_files(folder)]
    else:
        names = [path.name for path in folder.iterdir()]
        files = checkpoint_folder.tensor_files(checkpoint_folder.WEIGHTS, names)
    try:
        for file in files:
            with safe_open(folder / file, framework="pt"):  # checks its header
                pass
        return contents_in(folder, files)
    except (OSError, SafetensorError, KeyError):  # it is damaged, or of another type
        return None
