"""What a Hugging Face folder would hold, as far as it is there: a config, an index, and headers of its files.

For planning a load of files that are not here yet, or of which only the first bytes are.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from modelzoo import hf_files
from modelzoo import weights as tables
from modelzoo.tensor_files import TensorRef, contiguous_strides, read_safetensors_header

ABSENT = Path("(not here)")


@dataclasses.dataclass
class Headers:
    """Finds tensors like `hf_files.find_tensors`; what no header tells it takes from the config.

    Attributes:
        num_read: files whose headers were read.
        num_absent: files that are not here, as far as an index names them.
        assumed: the dtype that tensors without a header are taken for; None where there were none.
    """

    num_read: int = 0
    num_absent: int = 0
    assumed: np.dtype | None = None

    def find(
        self, folder: Path, table: tables.WeightTable, tensors: Iterable[tables.StoredTensor]
    ) -> dict[str, TensorRef]:
        """The tensors of a folder.

        Args:
            folder: holds a config.json at least.
            table: the family's names.
            tensors: what the config asks for.

        Raises:
            OSError, ValueError: a file is damaged.
        """
        weights = hf_files.weight_files(folder)
        named: dict[str, str] = {}
        if weights is None:
            files = []
        elif weights.endswith(hf_files.INDEX):
            named = hf_files.read_index(folder / weights)
            files = sorted(set(named.values()))
        else:
            files = [weights]
        here = [name for name in files if (folder / name).is_file()]
        refs: dict[str, TensorRef] = {}
        for name in here:
            if name.endswith(".safetensors"):
                refs |= read_safetensors_header(folder / name, whole=False)
            else:
                refs |= hf_files.READERS[hf_files.TORCH](folder / name)
        self.num_read, self.num_absent = len(here), len(files) - len(here)
        if files and not self.num_absent:
            return refs
        # Under the names of the index, or of the class where there is none.
        absent = {table.rename(name) for name, file in named.items() if file not in here}
        self.assumed = _config_dtype(folder)
        for tensor in tensors:
            names = (*tensor.names, *tensor.copies)
            name = next((name for name in names if name in absent), None) if named else tensor.name
            if name is not None:
                strides = contiguous_strides(tensor.shape)
                refs[name] = TensorRef(ABSENT, 0, self.assumed, tensor.shape, strides)
        return refs


def _config_dtype(folder: Path) -> np.dtype:
    config = hf_files.read_json(folder / hf_files.CONFIG)
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    try:
        dtype = np.dtype(getattr(jnp, name, name))
    except TypeError:
        dtype = np.dtype(object)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{folder / hf_files.CONFIG}: its torch_dtype {name!r} is no floating-point dtype")
    return dtype
