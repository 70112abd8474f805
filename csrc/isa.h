// Instruction sets: which ones the processor has, and the kernels compiled for each.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace headrace {

// Every instruction set that has kernels, from the plainest to the fastest.
const std::vector<std::string>& known_isas();

// Those that this processor and its operating system run, in the same order.
std::vector<std::string> supported_isas();

// The kernels of an instruction set; "auto" is the fastest supported one.
// Throws std::invalid_argument that lists the supported ones.
const Kernels& find_kernels(const std::string& isa);

}  // namespace headrace
