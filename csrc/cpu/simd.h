// Vectors of this instruction set: loads and stores of every dtype, fused multiply-add, exp, and transposes.
// Included inside the namespace of an instruction set. T is the type computed in, float or double; Vec<T> is one register of it.

#ifndef GSA_LAMBDA
#define GSA_LAMBDA __attribute__((always_inline))
#endif

template <class T> struct VecOf {
  typedef T strict __attribute__((vector_size(GSA_VECTOR_BYTES)));
  typedef T loose __attribute__((vector_size(GSA_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Int bits __attribute__((vector_size(GSA_VECTOR_BYTES)));
};
template <class T> using Vec = typename VecOf<T>::strict;
template <class T> using IntVec = typename VecOf<T>::bits;
template <class T> constexpr int LANES = GSA_VECTOR_BYTES / sizeof(T);

// f(0), f(1), ... f(N - 1), each with its index as a compile-time constant: arrays indexed by it live in registers.
template <int N, class F> GSA_INLINE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) GSA_LAMBDA { (f(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

template <class T> GSA_INLINE Vec<T> load(const T* p) { return *reinterpret_cast<const typename VecOf<T>::loose*>(p); }
template <class T> GSA_INLINE void store(T* p, Vec<T> x) { *reinterpret_cast<typename VecOf<T>::loose*>(p) = x; }

template <class T> GSA_INLINE Vec<T> splat(T x) {
#if GSA_AVX512
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_set1_ps(x);
  else return (Vec<T>)_mm512_set1_pd(x);
#elif GSA_AVX2
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_set1_ps(x);
  else return (Vec<T>)_mm256_set1_pd(x);
#else
  Vec<T> v;
  for (int i = 0; i < LANES<T>; ++i) v[i] = x;
  return v;
#endif
}

// a * b + c, in one rounding where the hardware has it (-std=c++20 keeps the compiler from fusing by itself)
template <class T> GSA_INLINE Vec<T> fma_(Vec<T> a, Vec<T> b, Vec<T> c) {
#if GSA_AVX512
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else return (Vec<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif GSA_AVX2
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else return (Vec<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

template <class T> GSA_INLINE Vec<T> max_(Vec<T> a, Vec<T> b) { return a > b ? a : b; }

// ---- exp ---------------------------------------------------------------------------------------------------------------------
// x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) - 1 by a polynomial; 2^n in two factors, so that results fade into denormals and
// overflow into infinity as they should. About 1 ulp. NaN stays NaN, -inf gives 0.
template <class T> struct ExpParts {
  Vec<T> m1, scale1, scale2;
};   // exp(x) = (1 + m1) * scale1 * scale2

template <class T> GSA_INLINE ExpParts<T> exp_parts(Vec<T> x) {
  using I = typename VecOf<T>::Int;
  constexpr bool single = sizeof(T) == 4;
  const Vec<T> lowest = splat(T(single ? -104.5 : -746)), highest = splat(T(single ? 89 : 710));
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const T magic = single ? T(12582912) : T(6755399441055744);                       // 1.5 * 2^(mantissa bits): rounds to an integer
  const Vec<T> shifted = fma_<T>(x, splat(T(1.4426950408889634)), splat(magic)), n = shifted - magic;
  const T ln2_hi = single ? T(0.693359375) : T(6.93147180369123816490e-01), ln2_lo = single ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  const Vec<T> r = fma_<T>(n, splat(-ln2_lo), fma_<T>(n, splat(-ln2_hi), x));
  Vec<T> poly;
  if constexpr (single) {
    const float c[] = {1.9875691500E-4f, 1.3981999507E-3f, 8.3334519073E-3f, 4.1665795894E-2f, 1.6666665459E-1f, 5.0000001201E-1f};
    poly = splat(c[0]);
    unroll<5>([&](auto i) GSA_LAMBDA { poly = fma_<T>(poly, r, splat(c[i + 1])); });
  } else {
    constexpr double c[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320,
                            1. / 5040,       1. / 720,       1. / 120,      1. / 24,      1. / 6,      1. / 2};
    poly = splat(c[0]);
    unroll<11>([&](auto i) GSA_LAMBDA { poly = fma_<T>(poly, r, splat(c[i + 1])); });
  }
  IntVec<T> bits, origin;
  const Vec<T> m = splat(magic);
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&origin, &m, sizeof origin);
  constexpr int mantissa = single ? 23 : 52;
  constexpr I bias = single ? 127 : 1023;
  const IntVec<T> e = bits - origin, e1 = e >> 1, e2 = e - e1;
  const IntVec<T> b1 = (e1 + bias) << mantissa, b2 = (e2 + bias) << mantissa;
  ExpParts<T> parts;
  parts.m1 = fma_<T>(poly * r, r, r);
  std::memcpy(&parts.scale1, &b1, sizeof b1);
  std::memcpy(&parts.scale2, &b2, sizeof b2);
  return parts;
}
template <class T> GSA_INLINE Vec<T> exp_(const ExpParts<T>& e) { return (e.m1 + T(1)) * e.scale1 * e.scale2; }
template <class T> GSA_INLINE Vec<T> exp_(Vec<T> x) { return exp_<T>(exp_parts<T>(x)); }
template <class T> GSA_INLINE Vec<T> one_minus_exp(const ExpParts<T>& e) {           // -expm1(x)
  const Vec<T> power = e.scale1 * e.scale2;
  return (T(1) - power) - e.m1 * power;
}

// log(1 + x) for x in [0, 1]: 2 atanh(x / (2 + x)) as a series
template <class T> GSA_INLINE Vec<T> log1p_(Vec<T> x) {
  const Vec<T> t = x / (x + T(2)), t2 = t * t;
  constexpr int terms = sizeof(T) == 4 ? 9 : 19;
  Vec<T> sum = splat(T(2.0 / (2 * terms + 1)));
  unroll<terms>([&](auto i) GSA_LAMBDA { sum = fma_<T>(sum, t2, splat(T(2.0 / (2 * (terms - 1 - i) + 1)))); });
  return sum * t;
}

// ---- sums and transposes ------------------------------------------------------------------------------------------------------
// One step of a transpose of W x W lanes: exchanges the off-diagonal halves of every 2 H x 2 H square of the rows a and b.
template <int H, class V, int... L> GSA_INLINE V exchange_low(V a, V b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, ((L & H) ? int(sizeof...(L)) + L - H : L)...);
}
template <int H, class V, int... L> GSA_INLINE V exchange_high(V a, V b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, ((L & H) ? int(sizeof...(L)) + L : L + H)...);
}
template <class T> using Lanes = std::make_integer_sequence<int, LANES<T>>;

template <int H, class T> GSA_INLINE void transpose_steps(Vec<T>* x) {
  if constexpr (H > 0) {
    unroll<LANES<T>>([&](auto i) GSA_LAMBDA {
      if constexpr (!(i & H)) {
        const Vec<T> a = x[i], b = x[i + H];
        x[i] = exchange_low<H>(a, b, Lanes<T>{});
        x[i + H] = exchange_high<H>(a, b, Lanes<T>{});
      }
    });
    transpose_steps<H / 2, T>(x);
  }
}
template <class T> GSA_INLINE void transpose(Vec<T>* x) { transpose_steps<LANES<T> / 2, T>(x); }

// Lane l of the result is the sum of the lanes of x[l]: a transpose that adds as it goes.
template <int H, class T> GSA_INLINE Vec<T> lane_sums(Vec<T>* x) {
  if constexpr (H == 0) {
    return x[0];
  } else {
    unroll<H>([&](auto i) GSA_LAMBDA { x[i] = exchange_low<H>(x[i], x[i + H], Lanes<T>{}) + exchange_high<H>(x[i], x[i + H], Lanes<T>{}); });
    return lane_sums<H / 2, T>(x);
  }
}
template <class T> GSA_INLINE Vec<T> lane_sums(Vec<T>* x) { return lane_sums<LANES<T> / 2, T>(x); }

template <class T> GSA_INLINE T sum_lanes(Vec<T> x) {
  T part[LANES<T>];
  store(part, x);
  for (int n = LANES<T> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) part[i] += part[i + n];
  return part[0];
}
template <class T> GSA_INLINE T max_lanes(Vec<T> x) {
  T part[LANES<T>];
  store(part, x);
  for (int n = LANES<T> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) part[i] = part[i] > part[i + n] ? part[i] : part[i + n];
  return part[0];
}

// ---- dtypes ---------------------------------------------------------------------------------------------------------------------
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int64_t bytes_of(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

GSA_INLINE float widen(float x) { return x; }
GSA_INLINE double widen(double x) { return x; }
GSA_INLINE float widen(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
GSA_INLINE float widen(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  uint32_t u = (rest << 13) + (uint32_t(127 - 15) << 23);
  float f;
  if (rest >= 0x7c00) u += uint32_t(128 - 16) << 23;                                // inf, NaN
  std::memcpy(&f, &u, 4);
  if (rest < 0x0400) f = float(rest) * 5.9604644775390625e-08f;                     // 2^-24
  std::memcpy(&u, &f, 4);
  u |= sign;
  std::memcpy(&f, &u, 4);
  return f;
}
GSA_INLINE void narrow(float x, float& y) { y = x; }
GSA_INLINE void narrow(double x, double& y) { y = x; }
GSA_INLINE void narrow(float x, bf16& y) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  y.bits = x != x ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
GSA_INLINE void narrow(float x, f16& y) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) {
    y.bits = sign | 0x7e00;
    return;
  }
  if (u >= 0x477ff000) {
    y.bits = sign | 0x7c00;
    return;
  }                          // 65520 and more
  if (u < 0x38800000) {                                                             // below 2^-14: a multiple of 2^-24, rounded by an addition
    float f;
    std::memcpy(&f, &u, 4);
    f += 0.5f;
    std::memcpy(&u, &f, 4);
    y.bits = sign | uint16_t(u - 0x3f000000);
    return;
  }
  u += (uint32_t(15 - 127) << 23) + 0xfff + ((u >> 13) & 1);
  y.bits = sign | uint16_t(u >> 13);
}

// LANES<T> elements of any dtype, widened to T
template <class T> GSA_INLINE Vec<T> load_as(const T* p) { return load<T>(p); }
template <class T> GSA_INLINE void store_as(T* p, Vec<T> x) { store<T>(p, x); }

typedef uint32_t UInts __attribute__((vector_size(GSA_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(GSA_VECTOR_BYTES / 2)));

template <class T> GSA_INLINE Vec<T> load_as(const bf16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  const UInts u = __builtin_convertvector(h, UInts) << 16;
  Vec<T> x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}
template <class T> GSA_INLINE void store_as(bf16* p, Vec<T> x) {
  UInts u;
  std::memcpy(&u, &x, sizeof u);
  const UInts rounded = u + 0x7fffu + ((u >> 16) & 1u), quiet = u | 0x400000u;
  const Halves h = __builtin_convertvector(((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded) >> 16, Halves);
  std::memcpy(p, &h, sizeof h);
}
template <class T> GSA_INLINE Vec<T> load_as(const f16* p) {
#if GSA_AVX512
  return (Vec<T>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif GSA_AVX2
  return (Vec<T>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  T x[LANES<T>];
  for (int i = 0; i < LANES<T>; ++i) x[i] = widen(p[i]);
  return load<T>(x);
#endif
}
template <class T> GSA_INLINE void store_as(f16* p, Vec<T> x) {
#if GSA_AVX512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif GSA_AVX2
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  T y[LANES<T>];
  store<T>(y, x);
  for (int i = 0; i < LANES<T>; ++i) narrow(y[i], p[i]);
#endif
}

// A row of n elements, padded with zeros to a multiple of the vector length when read.
template <class T, class S> GSA_INLINE Vec<T> load_part(const S* p, int n) {            // n < LANES<T>
  S part[LANES<T>] = {};
  std::memcpy(part, p, n * sizeof(S));
  return load_as<T>(part);
}
template <class T, class S> GSA_INLINE void store_part(S* p, Vec<T> x, int n) {
  S part[LANES<T>];
  store_as<T>(part, x);
  std::memcpy(p, part, n * sizeof(S));
}
template <class T, class S> GSA_INLINE Vec<T> load_some(const S* p, int n) { return n >= LANES<T> ? load_as<T>(p) : load_part<T>(p, n); }
template <class T, class S> GSA_INLINE void store_some(S* p, Vec<T> x, int n) { n >= LANES<T> ? store_as<T>(p, x) : store_part<T>(p, x, n); }

// f(typed pointer) for the dtype of a row; fp64 meets fp64 only.
template <class T, class F> GSA_INLINE void with_dtype(DType d, F&& f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<double*>(nullptr));
  } else {
    if (d == DType::f32) f(static_cast<float*>(nullptr));
    else if (d == DType::bf16) f(static_cast<bf16*>(nullptr));
    else f(static_cast<f16*>(nullptr));
  }
}

// A row of n elements, one of whose dtypes is T.
template <class T, class To, class From> inline void copy_row(To* to, const From* from, int64_t n) {
  if constexpr (std::is_same_v<To, From>) std::memcpy(to, from, n * sizeof(T));
  else
    for (int64_t i = 0; i < n; i += LANES<T>) {
      const int some = int(std::min<int64_t>(n - i, LANES<T>));
      store_some<T>(to + i, load_some<T>(from + i, some), some);
    }
}
// From, and to, element `at` of an array of that dtype.
template <class T> inline void load_row(T* to, const void* from, int64_t at, int64_t n, DType dtype) {
  with_dtype<T>(dtype, [&](auto* type) GSA_LAMBDA { copy_row<T>(to, static_cast<const std::remove_pointer_t<decltype(type)>*>(from) + at, n); });
}
template <class T> inline void store_row(void* to, int64_t at, const T* from, int64_t n, DType dtype) {
  with_dtype<T>(dtype, [&](auto* type) GSA_LAMBDA { copy_row<T>(static_cast<std::remove_pointer_t<decltype(type)>*>(to) + at, from, n); });
}
