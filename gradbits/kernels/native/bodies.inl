// Every kernel body, and the table that makes them known; GB_ISA names the namespace they are compiled in.

namespace GB_ISA {
namespace {
#include "noise.inl"
#include "quantize.inl"
#include "range.inl"
#include "symmetric.inl"
#include "weave.inl"
#include "tile.inl"
#include "blocks.inl"
#include "stores.inl"
#include "epilogue.inl"
#include "finish.inl"
#include "depthwise.inl"
#include "depth_rows.inl"
#include "depth_columns.inl"
#include "rows.inl"
#include "patches.inl"
#include "columns.inl"
#if GB_AMX && defined(GB_VNNI)
#include "amx_tile.inl"
#include "amx_rows.inl"
#include "amx_columns.inl"
#endif
#include "pack.inl"
#include "sums.inl"
#include "norm_lanes.inl"
#include "norm.inl"
#include "gelu.inl"
#include "column_sums.inl"
#include "digest.inl"
#include "attention.inl"
#include "attention_back.inl"
}  // namespace
}  // namespace GB_ISA
