/*
 * The compiled repacker as a program, to run it on processors that are emulated.
 *
 *     repack_main                                   prints the number of the best path
 *     repack_main TYPE PATH BLOCK_BYTES SIZE...     blocks on stdin -> arrays of SIZE bytes a block on stdout
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int q6k_best_path(void);
int q6k_encode(const char *type, int path, const uint8_t *blocks, int64_t n, uint8_t *const *arrays);

enum { MOST_BYTES = 1 << 20, MOST_ARRAYS = 8 };

int main(int count, char **arguments)
{
    static uint8_t blocks[MOST_BYTES];
    uint8_t *arrays[MOST_ARRAYS];
    if (count == 1)
        return printf("%d\n", q6k_best_path()) < 0;
    if (count < 5 || count - 4 > MOST_ARRAYS)
        return 2;
    const size_t bytes = fread(blocks, 1, MOST_BYTES, stdin), n = bytes / (size_t)atoi(arguments[3]);
    for (int i = 0; i < count - 4; i++)
        arrays[i] = malloc(n * (size_t)atoi(arguments[4 + i]));
    if (q6k_encode(arguments[1], atoi(arguments[2]), blocks, (int64_t)n, arrays) != 0)
        return 3;
    for (int i = 0; i < count - 4; i++)
        fwrite(arrays[i], (size_t)atoi(arguments[4 + i]), n, stdout);
    return 0;
}
