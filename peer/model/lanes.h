/* Sixteen floats side by side, on each kind of processor: what our kernels sum in. */

#pragma once

#include <stdint.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

/* Ask the memory for what comes soon behind these weights: without it one core gets a fifth less out of it. */
#define AHEAD 4096
INLINE void expect(const void *weights) { __builtin_prefetch((const char *)weights + AHEAD); }

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define WITH_AVX512
#include <immintrin.h>
typedef __m512 floats;
INLINE floats zero(void) { return _mm512_setzero_ps(); }
INLINE floats widen(const uint16_t *halves)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
}
INLINE floats same(float number) { return _mm512_set1_ps(number); }
INLINE floats times(floats one, floats other) { return _mm512_mul_ps(one, other); }
/* one * other + sum, rounded once. */
INLINE floats fused(floats one, floats other, floats sum) { return _mm512_fmadd_ps(one, other, sum); }
INLINE void store(float *to, floats from) { _mm512_storeu_ps(to, from); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define WITH_AVX2
#include <immintrin.h>
#define BOTH(value) {{value(0), value(1)}}
typedef struct { __m256 part[2]; } floats;
INLINE floats zero(void) { return (floats){{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
INLINE floats widen(const uint16_t *halves)
{
#define PART(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + 8 * p)))
    return (floats)BOTH(PART);
#undef PART
}
INLINE floats same(float number) { return (floats){{_mm256_set1_ps(number), _mm256_set1_ps(number)}}; }
INLINE floats times(floats one, floats other)
{
#define PART(p) _mm256_mul_ps(one.part[p], other.part[p])
    return (floats)BOTH(PART);
#undef PART
}
INLINE floats fused(floats one, floats other, floats sum)
{
#define PART(p) _mm256_fmadd_ps(one.part[p], other.part[p], sum.part[p])
    return (floats)BOTH(PART);
#undef PART
}
INLINE void store(float *to, floats from)
{
    _mm256_storeu_ps(to, from.part[0]);
    _mm256_storeu_ps(to + 8, from.part[1]);
}

#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define WITH_NEON
#include <arm_neon.h>
#define EACH for (int p = 0; p < 4; p++)
typedef struct { float32x4_t part[4]; } floats;
INLINE floats same(float number)
{
    floats to;
    EACH to.part[p] = vdupq_n_f32(number);
    return to;
}
INLINE floats zero(void) { return same(0); }
INLINE floats widen(const uint16_t *halves)
{
    floats to;
    EACH to.part[p] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + 4 * p)));
    return to;
}
INLINE floats times(floats one, floats other)
{
    EACH one.part[p] = vmulq_f32(one.part[p], other.part[p]);
    return one;
}
INLINE floats fused(floats one, floats other, floats sum)
{
    EACH sum.part[p] = vfmaq_f32(sum.part[p], one.part[p], other.part[p]);
    return sum;
}
INLINE void store(float *to, floats from) { EACH vst1q_f32(to + 4 * p, from.part[p]); }

#else
#error "this processor has neither AVX2 nor NEON with dot products"
#endif
