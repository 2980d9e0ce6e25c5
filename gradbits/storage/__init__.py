"""Deep Compression: pruning, weight sharing, and models as small checked files."""

from gradbits.storage.budget import Fit, fit_accuracy, fit_size
from gradbits.storage.compress import CompressReport, TensorReport, compress_tensor, save_compressed
from gradbits.storage.config import CompressConfig
from gradbits.storage.files import compress_file, decompress_file, load_compressed, verify_file
from gradbits.storage.prune import PruneSchedule, magnitude_mask, prune_
from gradbits.storage.reader import GbzFile
from gradbits.storage.share import load_shared_, share_, unshare_

__all__ = [
    "CompressConfig",
    "CompressReport",
    "Fit",
    "GbzFile",
    "PruneSchedule",
    "TensorReport",
    "compress_file",
    "compress_tensor",
    "decompress_file",
    "fit_accuracy",
    "fit_size",
    "load_compressed",
    "load_shared_",
    "magnitude_mask",
    "prune_",
    "save_compressed",
    "share_",
    "unshare_",
    "verify_file",
]
