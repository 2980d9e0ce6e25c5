// Every kernel body of the wire, and the table that makes them known; GB_ISA names the namespace they are compiled in.

namespace GB_ISA {
namespace {
#include "count.inl"
#include "huffman_tables.inl"
#include "huffman_encode.inl"
#include "huffman_decode.inl"
const WireKernels wire = {huffman_encode, huffman_decode, count};
}  // namespace
}  // namespace GB_ISA
