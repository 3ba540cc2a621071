// Has a sanitizer watch the kernels at tensors of exactly the sizes that they are for.
#include "in_turn.h"

int main() {
  for (const int32_t rows : {1, 9})
    for (const int32_t outs : {1, 35})
      for (const int32_t words : {4, 68})
        for (const int64_t bits : {1, 2, 4})
          for (const bool brain : {false, true}) {
            const int32_t cols = words * 32 / bits;
            const std::vector<uint16_t> x(rows * cols);
            const std::vector<uint32_t> codes(outs * words);
            const std::vector<float> scale(outs, 1.0f);
            std::vector<uint16_t> y(rows * outs);
            run_in_turn({x.data(), codes.data(), scale.data(), scale.data(), y.data(), rows, outs, cols, words}, bits, rows == 9,
                        brain, false);
          }
}
