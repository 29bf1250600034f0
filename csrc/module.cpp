// The Python module gsa_ext._C: importing it registers the ops (ops.cpp, autograd.cpp); it says what it was built with, and has the short way to the ops that
// a layer calls at every token.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "checks.h"
#include "signatures.h"

// Read by gsa_ext/_load.py from the file, before anything of it is loaded.
extern "C" __attribute__((used, visibility("default"))) const char gsa_ext_built[] =
    "gsa_ext-built;torch=" GSA_BUILT_TORCH ";cuda=" GSA_BUILT_CUDA ";archs=" GSA_BUILT_ARCHS ";why=" GSA_BUILT_WHY ";";

namespace gsa {
namespace {

// Arguments of a call from Python, for a typed signature. `plain` becomes false at the first that torch's own way in has to look at.
struct Arguments {
  PyObject* const* args;
  Py_ssize_t count;
  unsigned long of_token;  // bit i: argument i has a second axis, of one token
  bool plain = true;

  template <class T> void take(Py_ssize_t i, T& to) {
    if (i < count) read(i, args[i], to);
  }

 private:
  void read(Py_ssize_t i, PyObject* x, Tensor& to) {
    if (!(plain = plain && THPVariable_CheckExact(x))) return;
    if (of_token >> i & 1) to = THPVariable_Unpack(x).select(1, 0);
    else to = THPVariable_Unpack(x);
  }
  template <class T> void read(Py_ssize_t i, PyObject* x, std::optional<T>& to) {
    if (!Py_IsNone(x)) read(i, x, to.emplace());
  }
  void read(Py_ssize_t, PyObject* x, double& to) {
    if (!(plain = plain && (PyFloat_CheckExact(x) || PyLong_CheckExact(x)))) return;
    to = PyFloat_AsDouble(x);
    if (to == -1 && PyErr_Occurred()) PyErr_Clear(), plain = false;
  }
  void read(Py_ssize_t, PyObject* x, bool& to) {
    plain = plain && PyBool_Check(x);
    to = x == Py_True;
  }
};

template <size_t N> struct Name {
  char text[N];
  consteval Name(const char (&from)[N]) { std::copy_n(from, N, text); }
};

// torch.ops.gsa.<name>(*args) where args are plain tensors and nothing looks on but the dispatcher and what it calls: autocast, autograd, modes. Anything
// else, such as a tensor subclass, a mode of __torch_function__, torch.jit.trace or a wrong type: None, and torch.ops is to be asked, which takes longer
// than all the rest of a small step: it makes values of torch's interpreter of the arguments and checks them against the schema.
// args: all, or the `needed` that have no default; the defaults are none, 0 and false. bits: which of them have a second axis, of one token; if any has,
// what is returned has one, too.
template <Name name, class Signature, Py_ssize_t needed> struct ShortWay;
template <Name name, class... Ts, Py_ssize_t needed> struct ShortWay<name, Tensor(Ts...), needed> {
  static PyObject* call(PyObject* bits, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    constexpr Py_ssize_t all = sizeof...(Ts);
    if ((count != needed && count != all) || at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing()) Py_RETURN_NONE;
    Arguments x{args, count, PyLong_AsUnsignedLong(bits)};
    std::tuple<std::decay_t<Ts>...> values{};
    std::apply([&, i = 0](auto&... to) mutable { (x.take(i++, to), ...); }, values);
    if (!x.plain) Py_RETURN_NONE;
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow((std::string("gsa::") + name.text).c_str(), "").template typed<Tensor(Ts...)>();
    Tensor o;
    {
      const pybind11::gil_scoped_release released;
      o = std::apply([](const auto&... taken) { return op.call(taken...); }, values);
      if (x.of_token) o = o.unsqueeze(1);
    }
    return THPVariable_Wrap(std::move(o));
    END_HANDLE_TH_ERRORS
  }

  static PyMethodDef method() { return {name.text, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, nullptr}; }
};

PyMethodDef short_ways[] = {
    ShortWay<"step", StepSignature, 10>::method(),
    ShortWay<"conv_step", ConvStepSignature, 3>::method(),
    ShortWay<"window_step", WindowStepSignature, 7>::method(),
    ShortWay<"silu_norm", SiluNormSignature, 1>::method(),
    ShortWay<"mix", MixSignature, 3>::method(),
};

pybind11::object short_way(const std::string& name, uint32_t bits) {
  for (PyMethodDef& method : short_ways)
    if (name == method.ml_name) return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, pybind11::int_(bits).ptr()));
  throw pybind11::value_error("no short way to gsa::" + name);
}

}  // namespace
}  // namespace gsa

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native half of gsa_ext: its ops live under torch.ops.gsa.";
  m.attr("built") = gsa_ext_built;
  m.attr("compiler") = __VERSION__;
  m.def("set_checks", &gsa::set_checks, pybind11::arg("enabled"));
  m.def("checks", &gsa::checks);
  m.def("short_way", &gsa::short_way, pybind11::arg("name"), pybind11::arg("bits"));
}
