/* The lines at the head of an answer, put together in one go: `service.http.lines` has the same in Python. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

static const char CLOSE[] = "connection: close\r\n";
static const char LENGTH[] = "content-length: ";
enum { DIGITS = 20 };

/* The decimal digits of `number` at the end of `room`, at least `least`; returns how many. */
static size_t digits(char room[DIGITS], unsigned long long number, size_t least) {
    size_t count = 0;
    while (number != 0 || count < least) {
        room[DIGITS - ++count] = (char)('0' + number % 10);
        number /= 10;
    }
    return count;
}

static char *put(char *at, const char *data, size_t length) {
    memcpy(at, data, length);
    return at + length;
}

static char *put_bytes(char *at, PyObject *bytes) {
    return put(at, PyBytes_AS_STRING(bytes), (size_t)PyBytes_GET_SIZE(bytes));
}

PyDoc_STRVAR(head_doc,
             "head(opening, headers, closes, size)\n--\n\n"
             "`opening`, a line for each of the pairs `headers`, one more where the connection `closes`, the body's\n"
             "`size`, and the empty line.");

static PyObject *head(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    if (given != 4 || !PyBytes_Check(arguments[0]) || !PyList_CheckExact(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "head takes bytes, a list of pairs of bytes, whether, and a size");
        return NULL;
    }
    PyObject *headers = arguments[1];
    bool closes = arguments[2] == Py_True;
    unsigned long long size = PyLong_AsUnsignedLongLong(arguments[3]);
    if (PyErr_Occurred()) return NULL;
    char room[DIGITS];
    size_t size_digits = digits(room, size, 1);
    size_t length = (size_t)PyBytes_GET_SIZE(arguments[0]) + (closes ? sizeof CLOSE - 1 : 0) + sizeof LENGTH - 1 +
                    size_digits + 4;
    Py_ssize_t count = PyList_GET_SIZE(headers);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *pair = PyList_GET_ITEM(headers, i);
        if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2 || !PyBytes_Check(PyTuple_GET_ITEM(pair, 0)) ||
            !PyBytes_Check(PyTuple_GET_ITEM(pair, 1))) {
            PyErr_SetString(PyExc_TypeError, "a header is a pair of bytes");
            return NULL;
        }
        length += (size_t)(PyBytes_GET_SIZE(PyTuple_GET_ITEM(pair, 0)) + PyBytes_GET_SIZE(PyTuple_GET_ITEM(pair, 1)));
        length += 4;
    }
    PyObject *lines = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (lines == NULL) return NULL;
    char *at = put_bytes(PyBytes_AS_STRING(lines), arguments[0]);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *pair = PyList_GET_ITEM(headers, i);
        at = put_bytes(at, PyTuple_GET_ITEM(pair, 0));
        at = put(at, ": ", 2);
        at = put_bytes(at, PyTuple_GET_ITEM(pair, 1));
        at = put(at, "\r\n", 2);
    }
    if (closes) at = put(at, CLOSE, sizeof CLOSE - 1);
    at = put(at, LENGTH, sizeof LENGTH - 1);
    at = put(at, room + DIGITS - size_digits, size_digits);
    put(at, "\r\n\r\n", 4);
    return lines;
}

/* Seconds as milliseconds with three decimals; what is below 0, or no number, is 0, and an hour the most. */
static char *put_ms(char *at, double seconds) {
    double micros = rint(1e6 * fmin(fmax(seconds, 0.0), 3600.0));
    unsigned long long whole = (unsigned long long)micros;
    char room[DIGITS];
    size_t count = digits(room, whole / 1000, 1);
    at = put(at, room + DIGITS - count, count);
    *at++ = '.';
    count = digits(room, whole % 1000, 3);
    return put(at, room + DIGITS - count, count);
}

PyDoc_STRVAR(timing_doc,
             "timing(queue_s, compute_s, total_s)\n--\n\n"
             "The value of Server-Timing (W3C Server Timing): milliseconds of these seconds.");

static PyObject *timing(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    static const char *const NAMES[] = {"queue;dur=", ", compute;dur=", ", total;dur="};
    if (given != 3) {
        PyErr_SetString(PyExc_TypeError, "timing takes three numbers");
        return NULL;
    }
    char text[3 * (16 + DIGITS)], *at = text;
    for (int i = 0; i < 3; i++) {
        double seconds = PyFloat_AsDouble(arguments[i]);
        if (seconds == -1.0 && PyErr_Occurred()) return NULL;
        at = put(at, NAMES[i], strlen(NAMES[i]));
        at = put_ms(at, seconds);
    }
    return PyBytes_FromStringAndSize(text, at - text);
}

static PyMethodDef methods[] = {
    {"head", (PyCFunction)(void (*)(void))head, METH_FASTCALL, head_doc},
    {"timing", (PyCFunction)(void (*)(void))timing, METH_FASTCALL, timing_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_lines", "The lines at the head of an answer.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__lines(void) { return PyModule_Create(&definition); }
