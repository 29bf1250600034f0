// The Python module gsa_ext._C: importing it registers the ops (ops.cpp, autograd.cpp); it says what it was built with.
#include <pybind11/pybind11.h>

#include "checks.h"

// Read by gsa_ext/_load.py from the file, before anything of it is loaded.
extern "C" __attribute__((used, visibility("default"))) const char gsa_ext_built[] =
    "gsa_ext-built;torch=" GSA_BUILT_TORCH ";cuda=" GSA_BUILT_CUDA ";archs=" GSA_BUILT_ARCHS ";why=" GSA_BUILT_WHY ";";

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native half of gsa_ext: its ops live under torch.ops.gsa.";
  m.attr("built") = gsa_ext_built;
  m.attr("compiler") = __VERSION__;
  m.def("set_checks", &gsa::set_checks, pybind11::arg("enabled"));
  m.def("checks", &gsa::checks);
}
