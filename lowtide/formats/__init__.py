"""Number formats of tensors, range searches, and bit packing: arithmetic only, no modules."""

from lowtide.formats.adaptive import Adaptive
from lowtide.formats.affine import Affine, Grid
from lowtide.formats.kinds import (
    FLOAT_BITS,
    Format,
    FormatJson,
    InputFormat,
    WeightFormat,
    check_bits,
    format_from_json,
    format_to_json,
    most_bits,
)
from lowtide.formats.log2 import Log2
from lowtide.formats.mixed import Mixed
from lowtide.formats.own_range import OwnRange
from lowtide.formats.packing import pack, pack_mixed, packed_bytes, unpack, unpack_mixed
from lowtide.formats.search import SEARCHES, Search, check_search, minmax, mse, percentile
from lowtide.formats.stepped import Stepped
from lowtide.formats.table_packing import (
    PackedTable,
    flat_tables,
    pack_tables,
    table_words,
    unpack_tables,
)

__all__ = [
    "FLOAT_BITS",
    "SEARCHES",
    "Adaptive",
    "Affine",
    "Format",
    "FormatJson",
    "Grid",
    "InputFormat",
    "Log2",
    "Mixed",
    "OwnRange",
    "PackedTable",
    "Search",
    "Stepped",
    "WeightFormat",
    "check_bits",
    "check_search",
    "flat_tables",
    "format_from_json",
    "format_to_json",
    "minmax",
    "most_bits",
    "mse",
    "pack",
    "pack_mixed",
    "pack_tables",
    "packed_bytes",
    "percentile",
    "table_words",
    "unpack",
    "unpack_mixed",
    "unpack_tables",
]
