/*
 * The compiled products as a program, to run it on processors that are emulated.
 *
 *     products_main N K GROUP M     codes, scale, least and x on stdin -> y and the weights on stdout
 */
#include <stdio.h>
#include <stdlib.h>

#include "products.c"

static void *read_all(size_t bytes)
{
    void *data = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (fread(data, 1, bytes, stdin) != bytes)
        exit(3);
    return data;
}

int main(int count, char **arguments)
{
    Job job = {0};
    if (count != 5)
        return 2;
    job.n = atoi(arguments[1]), job.k = atoi(arguments[2]), job.group = atoi(arguments[3]), job.m = atoi(arguments[4]);
    const size_t n = (size_t)job.n, k = (size_t)job.k, groups = k / (size_t)job.group, m = (size_t)job.m;
    job.codes = read_all(n * k);
    job.scale = read_all(n * groups * 4), job.least = read_all(n * groups * 4), job.x = read_all(m * k * 4);
    job.sums = malloc(m * groups * 4);
    for (int only_expand = 0; only_expand < 2; only_expand++) {
        const size_t numbers = n * (only_expand ? k : m);
        job.y = malloc(numbers * 4);
        q6k_run(&job, only_expand, 0, NULL, 1);
        fwrite(job.y, 4, numbers, stdout);
    }
    return 0;
}
