// seda_fast._C: what was built, and what this CPU can run. The operators are in libraries of their own, which know
// PyTorch but not Python; this module knows Python but not PyTorch.
#include <pybind11/pybind11.h>

#include "build_report.h"
#include "cpu/features.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build report and CPU features of seda_fast's compiled half.";
  m.def(
      "build_report", [] { return py::module_::import("json").attr("loads")(SEDA_BUILD_REPORT); },
      "Compiler, flags, architectures, instruction sets, PyTorch headers and ABI version of the build, as a dict.");
  m.def(
      "cpu_features",
      [] {
        py::dict features;
        for (const char* isa : {"baseline", "avx2", "avx512"}) features[isa] = seda::cpu_has(isa);
        return features;
      },
      "Instruction sets of the row kernels by name, and whether this CPU has each.");
  m.def("own_products", &seda::own_products, "Whether products of float32 matrices are seda_fast's own, not PyTorch's.");
}
