"""What numbers a tensor may hold, how a range is searched, and how codes are packed: arithmetic, no modules."""

from lowtide.formats.adaptive import Adaptive
from lowtide.formats.affine import Affine, Grid
from lowtide.formats.log2 import Log2
from lowtide.formats.mixed import Mixed
from lowtide.formats.packing import pack, pack_mixed, packed_bytes, unpack, unpack_mixed
from lowtide.formats.plain import FLOAT_BITS, Format, check_bits, format_from_json, format_to_json
from lowtide.formats.search import SEARCHES, Search, check_search, minmax, mse, percentile
from lowtide.formats.table_packing import Table, bundle_words, bundled, unbundled

__all__ = [
    "FLOAT_BITS", "SEARCHES", "Adaptive", "Affine", "Format", "Grid", "Log2", "Mixed", "Search", "Table",
    "bundle_words", "bundled", "check_bits", "check_search", "format_from_json",
    "format_to_json", "minmax", "mse", "pack", "pack_mixed", "packed_bytes", "percentile", "unbundled", "unpack", "unpack_mixed",
]  # fmt: skip
