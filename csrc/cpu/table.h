// The entry points of this instruction set: the arithmetic follows q's dtype, fp64 for fp64 and fp32 for everything else.
constexpr Kernels table = {
    [](const ForwardParams& p) { p.q.dtype == DType::f64 ? chunk_forward<double>(p) : chunk_forward<float>(p); },
    [](const BackwardParams& p) { p.q.dtype == DType::f64 ? chunk_backward<double>(p) : chunk_backward<float>(p); },
    [](const ForwardParams& p) { p.q.dtype == DType::f64 ? recurrent_forward<double>(p) : recurrent_forward<float>(p); },
    [](const StepParams& p) { p.q.dtype == DType::f64 ? step<double>(p) : step<float>(p); },
    [](const AbcParams& p) { p.e.dtype == DType::f64 ? abc_gates<double>(p) : abc_gates<float>(p); },
    [](const AbcParams& p) { p.e.dtype == DType::f64 ? abc_gates_backward<double>(p) : abc_gates_backward<float>(p); },
};
