// Has a sanitizer watch the kernels at tensors of exactly the sizes that they are for.
#include "in_turn.h"

int main() {
  for (const int64_t rows : {1, 5, 33})
    for (const int64_t outs : {1, 67})
      for (const int64_t cols : {1, 33, 1025})
        for (const int64_t bits : {0, 1, 2, 3}) {
          const int64_t a_bits = 1 + bits / 2, w_bits = 1 + bits % 2, chunks = (cols + 31) / 32;
          const int64_t row_words = (cols * w_bits + 31) / 32;
          const std::vector<float> x(rows * cols, 1.0f), one(1, 1.0f), scale(outs, 1.0f);
          const std::vector<uint32_t> words(outs * row_words);
          const std::vector<int32_t> code_sums(outs);
          std::vector<uint32_t> planes(rows * a_bits * chunks);
          std::vector<int32_t> x_sums(rows), x_nan(rows);
          std::vector<float> y(rows * outs);
          const dsq::Problem p{
              x.data(), one.data(), one.data(), scale.data(), scale.data(), words.data(), code_sums.data(), planes.data(),
              x_sums.data(), x_nan.data(), y.data(), rows, outs, cols, chunks, row_words,
              0, a_bits == 1 ? 1.0f : 3.0f, 0.5f, 0.5f};
          run_in_turn(p, a_bits, w_bits, false);
        }
}
