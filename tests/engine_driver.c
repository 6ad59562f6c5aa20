// Run engine.c without Python, for other processors and sanitizers: engine_driver MODEL OUT.
// MODEL (test_engine.py writes it): int64 layers, prompts, tokens; Shape; the Linears; int32 ids; arrays, whose `at` is a place
// in the file. OUT: the logits of each prompt's last token, of all prompts at once and then of one step for each.
#include "../engine/engine.c"

int main(int argc, char **argv)
{
    FILE *in = argc == 3 ? fopen(argv[1], "rb") : NULL;
    if (!in || fseek(in, 0, SEEK_END)) return 3;
    const long bytes = ftell(in);
    char *file = NULL;
    if (posix_memalign((void **)&file, 64, bytes) || fseek(in, 0, SEEK_SET) || fread(file, 1, bytes, in) != (size_t)bytes) return 3;
    fclose(in);
    const int64_t *counts = (const int64_t *)file, n = counts[0], prompts = counts[1], tokens = counts[2];
    Shape *shape = (Shape *)(counts + 3);
    Linear *layers = (Linear *)(shape + 1);
    const int32_t *ids = (const int32_t *)(layers + n);
    for (Array *a = &shape->positions; a <= &shape->sin; a++) if (a->at) a->at = file + (intptr_t)a->at;
    for (int i = 0; i < n; i++)
        for (Array *a = &layers[i].code; a <= &layers[i].sums; a++) if (a->at) a->at = file + (intptr_t)a->at;
    Engine *e;
    const char *why = engine_new(shape, layers, n, &e);
    float *logits = calloc(prompts * shape->vocab, sizeof *logits);
    FILE *out = fopen(argv[2], "wb");
    for (int step = 0; step < 2 && !why && logits && out; step++) {
        int32_t id[4096], sequence[4096], at[4096];
        uint8_t wanted[4096];
        int many = 0;
        for (int p = 0; p < prompts; p++)
            for (int t = step ? tokens - 1 : 0; t < tokens - !step; t++, many++)
                id[many] = ids[p * tokens + t], sequence[many] = p, at[many] = t, wanted[many] = t == tokens - 2 + step;
        why = engine_run(e, many, id, sequence, at, wanted, logits, NULL, 0, 0, 0, NULL);
        fwrite(logits, sizeof *logits, prompts * shape->vocab, out);
    }
    if (why) fprintf(stderr, "%s\n", why);
    if (out) fclose(out);
    engine_free(e), free(logits), free(file);
    return !!why;
}
