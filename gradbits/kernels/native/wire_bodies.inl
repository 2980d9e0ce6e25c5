// Every kernel body of the wire, and the table that makes them known; GB_ISA names the namespace they are compiled in.

namespace GB_ISA {
namespace {
#include "noise.inl"
#include "symbols.inl"
#include "norms.inl"
#include "bucket_encode.inl"
#include "bucket_decode.inl"
#include "count.inl"
#include "huffman_tables.inl"
#include "huffman_encode.inl"
#include "huffman_decode.inl"
const WireKernels wire = {huffman_encode, huffman_decode, count,          pack_symbols,
                          unpack_symbols, bucket_norms,   encode_buckets, decode_buckets};
}  // namespace
}  // namespace GB_ISA
