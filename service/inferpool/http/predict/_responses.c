/* Puts small responses together: the head from its lines, the body behind it, and the times of Server-Timing.

   Purpose. Formatting a head in Python takes a twelfth of a small request's instructions. response.py, and response_head.py
   of http/connection, are the only callers, and work without this module.

   GIL. Everything is done with the GIL held, and only objects that cannot change are read: bytes, and the items of
   lists, to which a reference is held while they are used.

   Limits. `join` takes bytes only. A header with a line feed, a carriage return or a NUL in it is left out. The size
   of a response fits in Py_ssize_t. The module has no state of its own, so it works in every subinterpreter. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdbool.h>
#include <string.h>

enum { MOST_PIECES = 16 }; /* headers, and parts of a body, in one response */

static bool splits(PyObject *text) {
    const char *at = PyBytes_AS_STRING(text);
    size_t size = (size_t)PyBytes_GET_SIZE(text);
    return memchr(at, '\n', size) != NULL || memchr(at, '\r', size) != NULL || memchr(at, 0, size) != NULL;
}

static char *put(char *to, const char *from, size_t size) {
    memcpy(to, from, size);
    return to + size;
}

static char *put_bytes(char *to, PyObject *from) {
    return put(to, PyBytes_AS_STRING(from), (size_t)PyBytes_GET_SIZE(from));
}

/* Writes a number, which is at least 0, in decimal digits. */
static char *put_number(char *to, long long number) {
    char digits[24], *at = digits + sizeof digits;
    do {
        *--at = (char)('0' + number % 10);
        number /= 10;
    } while (number);
    return put(to, at, (size_t)(digits + sizeof digits - at));
}

PyDoc_STRVAR(join_doc,
             "join(prefix, headers, last, size, parts)\n--\n\n"
             "Return a response: `prefix`, a line for each pair in the list `headers`, `last` with the number `size`, an\n"
             "empty line, and the bytes in the list `parts`. Returns None if it has more headers or parts than the\n"
             "module takes, or if they are not all bytes.");

static PyObject *join(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    if (given != 5 || !PyBytes_Check(arguments[0]) || !PyList_Check(arguments[1]) || !PyBytes_Check(arguments[2]) ||
        !PyList_Check(arguments[4])) {
        PyErr_SetString(PyExc_TypeError, "join takes bytes, a list, bytes, a number and a list");
        return NULL;
    }
    long long size = PyLong_AsLongLong(arguments[3]);
    if (size == -1 && PyErr_Occurred()) return NULL;
    PyObject *headers = arguments[1], *parts = arguments[4];
    Py_ssize_t pairs = PyList_GET_SIZE(headers), count = PyList_GET_SIZE(parts);
    if (size < 0 || pairs > MOST_PIECES || count > MOST_PIECES) Py_RETURN_NONE;
    /* The GIL is held until the end, and no Python code runs: nobody changes the lists. */
    PyObject *kept[MOST_PIECES];
    Py_ssize_t total = PyBytes_GET_SIZE(arguments[0]) + PyBytes_GET_SIZE(arguments[2]) + 24;
    int lines = 0;
    for (Py_ssize_t i = 0; i < pairs; i++) {
        PyObject *pair = PyList_GET_ITEM(headers, i);
        if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2) Py_RETURN_NONE;
        PyObject *name = PyTuple_GET_ITEM(pair, 0), *value = PyTuple_GET_ITEM(pair, 1);
        if (!PyBytes_Check(name) || !PyBytes_Check(value)) Py_RETURN_NONE;
        if (splits(name) || splits(value)) continue;
        kept[lines++] = pair;
        total += PyBytes_GET_SIZE(name) + PyBytes_GET_SIZE(value) + 4;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *part = PyList_GET_ITEM(parts, i);
        if (!PyBytes_Check(part)) Py_RETURN_NONE;
        total += PyBytes_GET_SIZE(part);
    }
    PyObject *response = PyBytes_FromStringAndSize(NULL, total);
    if (response == NULL) return NULL;
    char *at = put_bytes(PyBytes_AS_STRING(response), arguments[0]);
    for (int i = 0; i < lines; i++) {
        at = put(put_bytes(at, PyTuple_GET_ITEM(kept[i], 0)), ": ", 2);
        at = put(put_bytes(at, PyTuple_GET_ITEM(kept[i], 1)), "\r\n", 2);
    }
    at = put(put_number(put_bytes(at, arguments[2]), size), "\r\n\r\n", 4);
    for (Py_ssize_t i = 0; i < count; i++) at = put_bytes(at, PyList_GET_ITEM(parts, i));
    _PyBytes_Resize(&response, at - PyBytes_AS_STRING(response)); /* NULL, with an exception, if it fails */
    return response;
}

static const double LONGEST_MS = 3600000.0; /* longer times are shown as this one */

/* Writes seconds as milliseconds with three decimals, as "%.3f" rounds them; returns NULL with an exception. */
static char *put_milliseconds(char *to, double seconds) {
    double ms = 1000 * (seconds > 0 ? seconds : 0.0);
    if (ms > LONGEST_MS) ms = LONGEST_MS;
    double exact = 1000 * ms, whole = floor(exact), rest = exact - whole;
    if (fabs(rest - 0.5) < 1e-5) { /* the product above is not exact enough to tell which way to round */
        char *text = PyOS_double_to_string(ms, 'f', 3, 0, NULL);
        if (text == NULL) return NULL;
        to = put(to, text, strlen(text));
        PyMem_Free(text);
        return to;
    }
    long long thousandths = (long long)whole + (rest > 0.5);
    to = put(put_number(to, thousandths / 1000), ".", 1);
    int decimals = (int)(thousandths % 1000);
    *to++ = (char)('0' + decimals / 100);
    *to++ = (char)('0' + decimals / 10 % 10);
    *to++ = (char)('0' + decimals % 10);
    return to;
}

PyDoc_STRVAR(server_timing_doc,
             "server_timing(queue_s, compute_s, total_s)\n--\n\n"
             "Return the value of Server-Timing: three times in milliseconds with three decimals.");

static PyObject *server_timing(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    static const char *const names[] = {"queue;dur=", ", compute;dur=", ", total;dur="};
    if (given != 3) {
        PyErr_SetString(PyExc_TypeError, "server_timing takes three numbers");
        return NULL;
    }
    char text[128], *at = text; /* at most 38 characters of names, and 11 of each number */
    for (int i = 0; i < 3; i++) {
        double seconds = PyFloat_AsDouble(arguments[i]);
        if (seconds == -1.0 && PyErr_Occurred()) return NULL;
        at = put(at, names[i], strlen(names[i]));
        at = put_milliseconds(at, seconds);
        if (at == NULL) return NULL;
    }
    return PyBytes_FromStringAndSize(text, at - text);
}

static PyMethodDef methods[] = {
    {"join", (PyCFunction)(void (*)(void))join, METH_FASTCALL, join_doc},
    {"server_timing", (PyCFunction)(void (*)(void))server_timing, METH_FASTCALL, server_timing_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_responses",
    .m_doc = "Puts small responses together.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__responses(void) { return PyModuleDef_Init(&definition); }
