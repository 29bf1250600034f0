// The Python module gsa_ext._C: importing it registers the ops (ops.cpp, autograd.cpp); it says what it was built with, and has the short way to the step.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "checks.h"
#include "step.h"

// Read by gsa_ext/_load.py from the file, before anything of it is loaded.
extern "C" __attribute__((used, visibility("default"))) const char gsa_ext_built[] =
    "gsa_ext-built;torch=" GSA_BUILT_TORCH ";cuda=" GSA_BUILT_CUDA ";archs=" GSA_BUILT_ARCHS ";why=" GSA_BUILT_WHY ";";

namespace gsa {
namespace {

// Arguments of a call from Python. `plain` becomes false at the first that torch's own way in has to look at. token: inputs have an axis of one token.
struct Arguments {
  PyObject* const* args;
  bool token = false, plain = true;

  Tensor tensor(int i) { return (plain = plain && THPVariable_CheckExact(args[i])) ? THPVariable_Unpack(args[i]) : Tensor(); }
  OptTensor optional(int i) { return Py_IsNone(args[i]) ? std::nullopt : OptTensor(tensor(i)); }
  Tensor of_token(int i) {
    Tensor x = tensor(i);
    return plain && token ? x.select(1, 0) : x;
  }
  OptTensor optional_of_token(int i) { return Py_IsNone(args[i]) ? std::nullopt : OptTensor(of_token(i)); }
  double number(int i) {
    plain = plain && (PyFloat_CheckExact(args[i]) || PyLong_CheckExact(args[i]));
    const double x = plain ? PyFloat_AsDouble(args[i]) : 0;
    if (x == -1 && PyErr_Occurred()) PyErr_Clear(), plain = false;
    return x;
  }
  bool flag(int i) {
    plain = plain && PyBool_Check(args[i]);
    return args[i] == Py_True;
  }
};

// torch.ops.gsa.step(*args) where args are plain tensors and nothing looks on but the dispatcher and what it calls: autocast, autograd, modes. Anything
// else, such as a tensor subclass, a mode of __torch_function__, torch.jit.trace or a wrong type: None, and torch.ops is to be asked, which takes longer
// than all the rest of a small step: it makes values of torch's interpreter of the arguments and checks them against the schema.
// One more argument, true: q, k, v, s, g, mask, cos and sin have a second axis, of one token, and so has what is returned.
PyObject* step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr Py_ssize_t needed = 10, all = 16;
  if ((count != needed && count != all && count != all + 1) || at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing()) Py_RETURN_NONE;
  Arguments x{args, count > all && args[all] == Py_True};
  const Tensor q = x.of_token(0), k = x.of_token(1), v = x.of_token(2), hk = x.tensor(5), hv = x.tensor(6);
  const OptTensor s = x.optional_of_token(3), g = x.optional_of_token(4), z = x.optional(7), state_indices = x.optional(9);
  const std::optional<double> scale = Py_IsNone(args[8]) ? std::nullopt : std::optional(x.number(8));
  OptTensor mask, cos, sin;
  double gate_normalizer = 0;
  bool silu_qk = false, silu_v = false;
  if (count >= all) {
    mask = x.optional_of_token(10), gate_normalizer = x.number(11), cos = x.optional_of_token(12), sin = x.optional_of_token(13);
    silu_qk = x.flag(14), silu_v = x.flag(15);
  }
  if (!x.plain) Py_RETURN_NONE;
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::step", "").typed<StepSignature>();
  Tensor o;
  {
    const pybind11::gil_scoped_release released;
    o = op.call(q, k, v, s, g, hk, hv, z, scale, state_indices, mask, gate_normalizer, cos, sin, silu_qk, silu_v);
    if (x.token) o = o.unsqueeze(1);
  }
  return THPVariable_Wrap(std::move(o));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {{"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)), METH_FASTCALL, nullptr}, {}};

}  // namespace
}  // namespace gsa

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native half of gsa_ext: its ops live under torch.ops.gsa.";
  m.attr("built") = gsa_ext_built;
  m.attr("compiler") = __VERSION__;
  m.def("set_checks", &gsa::set_checks, pybind11::arg("enabled"));
  m.def("checks", &gsa::checks);
  if (PyModule_AddFunctions(m.ptr(), gsa::methods) != 0) throw pybind11::error_already_set();
}
