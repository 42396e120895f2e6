// A PJRT plugin that does nothing: version 0.MINOR, a table of FUNCTIONS functions, most of them missing. Where CODE is not 0,
// starting it fails with that code.
#include <stddef.h>

typedef struct {
    size_t struct_size;
    void *extension_start;
    const void *error;
    const char *message;
    size_t message_size;
} Message;

typedef struct {
    size_t struct_size;
    void *extension_start;
    const void *error;
    int code;
} GetCode;

static const char words[] = "another process holds the stub\n=== Source Location Trace: ===\nstub.c:1";

static void destroy(void *args) { (void)args; }

static void message(Message *args) {
    args->message = words;
    args->message_size = sizeof words - 1;
}

static void *get_code(GetCode *args) {
    args->code = CODE;
    return NULL;
}

static void *initialize(void *args) {
    (void)args;
    return CODE ? (void *)words : NULL;
}

static struct {
    size_t struct_size;
    void *extension_start;
    struct {
        size_t struct_size;
        void *extension_start;
        int major, minor;
    } version;
    void *functions[FUNCTIONS];
} table;

const void *GetPjrtApi(void) {
    table.struct_size = sizeof table;
    table.version.struct_size = sizeof table.version;
    table.version.minor = MINOR;
    table.functions[0] = (void *)destroy;
    table.functions[1] = (void *)message;
    table.functions[2] = (void *)get_code;
    table.functions[3] = (void *)initialize;
    return &table;
}
