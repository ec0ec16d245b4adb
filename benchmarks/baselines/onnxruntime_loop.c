// Times onnxruntime's C API on one model in a tight loop: what a native benchmark program does, without Python.
//
//   onnxruntime_loop MODEL INPUT OUTPUT INPUT.f32 RUNS WARMUP_MS DIMENSION...
//
// INPUT and OUTPUT are the tensors' names, INPUT.f32 holds the input's raw floats. One line of JSON: every inference in
// ns, and the first number of the output, so that it can be seen that the model ran.
//
// The wheel has the library without its headers. Its API is a table of functions whose order never changes (new ones
// are appended), so the few that are needed are taken by their place in that table. Build with -std=gnu11.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { GET_MESSAGE = 2, CREATE_ENV = 3, CREATE_SESSION = 7, RUN = 9, CREATE_OPTIONS = 10, INTRA_THREADS = 24,
       INTER_THREADS = 25, TENSOR_WITH_DATA = 49, TENSOR_DATA = 51, CPU_MEMORY = 69, RELEASE_VALUE = 96 };
enum { LOG_ERRORS = 3, FLOAT32 = 1, ARENA = 1, DEFAULT_MEMORY = 0, OLDEST_API = 16, MOST_DIMENSIONS = 8 };

typedef void *Status;  // NULL: all is well
typedef struct { const void *const *(*get_api)(uint32_t); const char *(*get_version)(void); } Base;
extern const Base *OrtGetApiBase(void);

static const void *const *api;

static void check(Status failed) {
  if (failed == NULL) return;
  fprintf(stderr, "onnxruntime: %s\n", ((const char *(*)(Status))api[GET_MESSAGE])(failed));
  exit(1);
}

static int64_t read_clock(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int main(int count, char **given) {
  if (count < 8 || count > 7 + MOST_DIMENSIONS) return 2;
  api = OrtGetApiBase()->get_api(OLDEST_API);
  if (api == NULL) return 3;
  void *env, *options, *session, *memory, *input;
  check(((Status(*)(int, const char *, void **))api[CREATE_ENV])(LOG_ERRORS, "loop", &env));
  check(((Status(*)(void **))api[CREATE_OPTIONS])(&options));
  check(((Status(*)(void *, int))api[INTRA_THREADS])(options, 1));
  check(((Status(*)(void *, int))api[INTER_THREADS])(options, 1));
  check(((Status(*)(void *, const char *, void *, void **))api[CREATE_SESSION])(env, given[1], options, &session));

  int64_t shape[MOST_DIMENSIONS];
  size_t rank = (size_t)(count - 7), numbers = 1;
  for (size_t i = 0; i < rank; ++i) numbers *= (size_t)(shape[i] = atoll(given[7 + i]));
  float *data = malloc(numbers * sizeof *data);
  FILE *file = fopen(given[4], "rb");
  if (data == NULL || file == NULL || fread(data, sizeof *data, numbers, file) != numbers) return 4;
  check(((Status(*)(int, int, void **))api[CPU_MEMORY])(ARENA, DEFAULT_MEMORY, &memory));
  check(((Status(*)(void *, void *, size_t, const int64_t *, size_t, int, void **))api[TENSOR_WITH_DATA])(
      memory, data, numbers * sizeof *data, shape, rank, FLOAT32, &input));

  Status (*run)(void *, void *, const char *const *, const void *const *, size_t, const char *const *, size_t,
                void **) = api[RUN];
  void (*release)(void *) = api[RELEASE_VALUE];
  const char *const in[] = {given[2]}, *const out[] = {given[3]};
  const void *const values[] = {input};
  const long runs = atol(given[5]);
  const int64_t warm = read_clock() + atoll(given[6]) * 1000000;
  int64_t *taken = calloc((size_t)runs, sizeof *taken);
  float first = 0;
  for (long i = 0; i < runs; i += read_clock() >= warm) {
    void *output = NULL;
    const int64_t before = read_clock();
    check(run(session, NULL, in, values, 1, out, 1, &output));
    taken[i] = read_clock() - before;  // the warm-up's are overwritten
    float *numbers_out;
    check(((Status(*)(void *, void **))api[TENSOR_DATA])(output, (void **)&numbers_out));
    first = numbers_out[0];
    release(output);
  }
  printf("{\"version\": \"%s\", \"first\": %.9g, \"ns\": [", OrtGetApiBase()->get_version(), first);
  for (long i = 0; i < runs; ++i) printf("%s%lld", i ? ", " : "", (long long)taken[i]);
  puts("]}");
  fflush(stdout);
  _Exit(0);  // the library's own farewell takes its time
}
