"""Read PyTorch's pickled weights (pytorch_model.bin) one tensor at a time, without running what a pickle may hold.

torch.load with weights_only=True takes tensors and refuses everything else. With mmap=True it maps the file and reads
nothing. A file is opened anew for each tensor, because pages that were touched stay resident as long as the mapping lives.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagscale_like.checkpoint.tensor_file import TensorSpec


class PickleFile:
    """Reads one file of pickled weights, as TensorFile reads a safetensors file.

    Attributes:
        specs: every tensor, by name.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is truncated, of another form, or holds something beside tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._check_archive()
        self.specs = {name: TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in self._load().items()}

    def _check_archive(self) -> None:
        """torch maps the members of the archive where they lie, so that they must not be compressed."""
        with open(self.path, "rb") as file:
            head = file.read(4)
        if head != b"PK\x03\x04":
            raise ValueError("not an archive of PyTorch 1.6 or later; load it with torch and save it anew")
        try:
            with zipfile.ZipFile(self.path) as archive:
                compressed = [entry.filename for entry in archive.infolist() if entry.compress_type]
        except zipfile.BadZipFile as error:
            raise ValueError(f"truncated or damaged ({error}); fetch it again") from None
        if compressed:
            raise ValueError(f"its member {compressed[0]} is compressed, as PyTorch writes none: fetch it again")

    def _load(self) -> dict[str, Tensor]:
        try:
            found: Any = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            reason = next(
                (line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), ""
            )
            raise ValueError(
                f"holds more than tensors, which is not executed; {reason or 'save it as safetensors'}"
            ) from None
        except (RuntimeError, KeyError, TypeError, AttributeError, IndexError, EOFError) as error:
            raise ValueError(
                f"damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from None
        if not isinstance(found, dict):
            raise ValueError(f"holds {type(found).__name__}, not tensors by name")
        for name, tensor in found.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                raise ValueError(f"holds {name!r}, which is {type(tensor).__name__}, no dense tensor")
        return found

    def get_tensor(self, name: str, *, whole: bool = False) -> Tensor:
        """A tensor on the host, mapped from the file. Writing to it does not reach the file.

        Args:
            whole: of no meaning here; see TensorFile.

        Raises:
            KeyError: the file has no tensor of this name.
        """
        return self._load()[name].detach().contiguous()

    def close(self) -> None:
        """No file is open between two tensors."""
