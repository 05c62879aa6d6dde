/* Reads from many sockets, or writes to many sockets, in one call; puts together what is written.

   Purpose. The event loop takes and gives back the GIL once for each socket. With hundreds of small requests a
   second that keeps the instances' threads from running. `receive` and `send_all` release the GIL once for all
   sockets. `join` puts a small response together: in Python, that takes a tenth of a small request's instructions.
   batched_reads.py, batched_writes.py and response_head.py are the only callers, and work without this module.

   GIL. Arguments are checked and results are built with the GIL held. All system calls are made without the GIL.
   Meanwhile nothing touches a Python object: `receive` holds a buffer of its bytearray, which therefore cannot be
   resized, and `send_all` holds references to its bytes. Two threads must not pass the same bytearray at once.
   `join` keeps the GIL, runs no Python code, and reads only lists, tuples and bytes.
   The module has no state of its own, so it works in every subinterpreter.

   Limits. No call waits: sockets are polled, read and written without blocking. A system call that a signal
   interrupts (EINTR) is made again. `receive` handles at most MOST_SOCKETS sockets a call; the next call continues
   with the others. `send_all` tries each socket once; the caller sends the bytes that a socket did not take. A
   socket that fails is reported as ended, or as having taken nothing, and the event loop finds the error itself.
   If memory runs out in `receive` after the sockets were read, these bytes are lost and MemoryError is raised.
   `join` takes bytes only, and leaves out a header with a line feed, a carriage return or a NUL in it.

   The bytes go past the transport. Callers pass only descriptors of connections whose transport is paused
   (`receive`) or has nothing left to write (`send_all`). For TLS they decrypt and encrypt the bytes themselves.

   Linux only: epoll and MSG_NOSIGNAL. Elsewhere this file does not compile, setup.py leaves the module out, and
   the event loop reads and writes each connection by itself. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/types.h>

enum { MOST_SOCKETS = 64 }; /* read in one call of `receive` */

/* Reads a file descriptor; -1 with an exception set if `number` is none. */
static int as_descriptor(PyObject *number) {
    int overflow;
    long descriptor = PyLong_AsLongAndOverflow(number, &overflow);
    if (descriptor == -1 && PyErr_Occurred()) return -1;
    if (overflow || descriptor < 0 || descriptor > INT_MAX) {
        PyErr_Format(PyExc_ValueError, "a descriptor is from 0 to %d, not %R", INT_MAX, number);
        return -1;
    }
    return (int)descriptor;
}

typedef struct {
    int descriptor;
    ssize_t size; /* bytes read; 0 at the end of the stream, -1 after an error */
} Arrival;

PyDoc_STRVAR(receive_doc,
             "receive(epoll, buffer, most)\n--\n\n"
             "Read from the readable sockets of the epoll instance with the descriptor `epoll`.\n\n"
             "Reads at most `most` bytes from each socket, by way of the bytearray `buffer`, and from no more sockets\n"
             "than `buffer` has room for. Returns pairs of a descriptor and its bytes, or None instead of the bytes\n"
             "if the stream has ended or failed. Raises ValueError unless 1 <= most <= len(buffer), and OSError if\n"
             "`epoll` cannot be polled.");

static PyObject *receive(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    if (given != 3 || !PyByteArray_CheckExact(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "receive takes a descriptor, a bytearray and a number of bytes");
        return NULL;
    }
    int epoll = as_descriptor(arguments[0]);
    if (epoll < 0) return NULL;
    Py_ssize_t most = PyLong_AsSsize_t(arguments[2]);
    if (most == -1 && PyErr_Occurred()) return NULL;
    Py_buffer buffer; /* while it is held the bytearray cannot move */
    if (PyObject_GetBuffer(arguments[1], &buffer, PyBUF_WRITABLE) < 0) return NULL;
    if (most < 1 || most > buffer.len) {
        PyErr_Format(PyExc_ValueError, "most is %zd; it is from 1 to the length of the buffer, %zd", most, buffer.len);
        PyBuffer_Release(&buffer);
        return NULL;
    }
    struct epoll_event events[MOST_SOCKETS];
    Arrival arrivals[MOST_SOCKETS];
    int ready, count = 0, failure = 0;
    char *free_part = buffer.buf;
    Py_ssize_t fit = buffer.len / most;
    Py_BEGIN_ALLOW_THREADS
    /* epoll moves the sockets it reports behind all others. Asking for no more than are read keeps that fair. */
    ready = epoll_wait(epoll, events, fit < MOST_SOCKETS ? (int)fit : MOST_SOCKETS, 0);
    if (ready < 0) failure = errno;
    for (int i = 0; i < ready; i++) {
        ssize_t size;
        do
            size = recv(events[i].data.fd, free_part, (size_t)most, MSG_DONTWAIT);
        while (size < 0 && errno == EINTR);
        if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) continue;
        arrivals[count++] = (Arrival){events[i].data.fd, size};
        if (size > 0) free_part += size;
    }
    Py_END_ALLOW_THREADS
    PyObject *result = NULL;
    if (failure != 0 && failure != EINTR) {
        errno = failure;
        PyErr_SetFromErrno(PyExc_OSError);
        goto end;
    }
    result = PyList_New(count);
    const char *data = buffer.buf;
    for (int i = 0; result != NULL && i < count; i++) {
        ssize_t size = arrivals[i].size;
        PyObject *pair = size > 0 ? Py_BuildValue("(iy#)", arrivals[i].descriptor, data, (Py_ssize_t)size)
                                  : Py_BuildValue("(iO)", arrivals[i].descriptor, Py_None);
        if (size > 0) data += size;
        if (pair == NULL) Py_CLEAR(result);
        else PyList_SET_ITEM(result, i, pair);
    }
end:
    PyBuffer_Release(&buffer);
    return result;
}

typedef struct {
    int descriptor;
    const char *data;
    size_t length;
    ssize_t taken; /* bytes written; -1 after an error */
} Write;

PyDoc_STRVAR(send_all_doc,
             "send_all(sockets, bodies)\n--\n\n"
             "Send to each descriptor in the list `sockets` the bytes at the same index of the list `bodies`.\n\n"
             "Returns a list of how many bytes each socket has taken: fewer than there are if its buffer is full,\n"
             "0 if it failed.");

static PyObject *send_all(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    if (given != 2 || !PyList_CheckExact(arguments[0]) || !PyList_CheckExact(arguments[1]) ||
        PyList_GET_SIZE(arguments[0]) != PyList_GET_SIZE(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "send_all takes two lists of the same length");
        return NULL;
    }
    /* Copies of the lists keep the bytes alive, whatever other threads do to the lists meanwhile. */
    PyObject *sockets = PyList_AsTuple(arguments[0]), *bodies = PyList_AsTuple(arguments[1]);
    PyObject *result = NULL;
    Write *writes = NULL;
    if (sockets == NULL || bodies == NULL) goto end;
    Py_ssize_t count = PyTuple_GET_SIZE(sockets);
    writes = calloc(count > 0 ? (size_t)count : 1, sizeof(Write));
    if (writes == NULL) {
        PyErr_NoMemory();
        goto end;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *body = PyTuple_GET_ITEM(bodies, i);
        if (!PyBytes_Check(body)) {
            PyErr_Format(PyExc_TypeError, "send_all sends bytes, not %.100s", Py_TYPE(body)->tp_name);
            goto end;
        }
        int descriptor = as_descriptor(PyTuple_GET_ITEM(sockets, i));
        if (descriptor < 0) goto end;
        writes[i] = (Write){descriptor, PyBytes_AS_STRING(body), (size_t)PyBytes_GET_SIZE(body), 0};
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++) {
        do
            writes[i].taken = send(writes[i].descriptor, writes[i].data, writes[i].length, MSG_DONTWAIT | MSG_NOSIGNAL);
        while (writes[i].taken < 0 && errno == EINTR);
    }
    Py_END_ALLOW_THREADS
    result = PyList_New(count);
    for (Py_ssize_t i = 0; result != NULL && i < count; i++) {
        PyObject *taken = PyLong_FromSsize_t(writes[i].taken > 0 ? (Py_ssize_t)writes[i].taken : 0);
        if (taken == NULL) Py_CLEAR(result);
        else PyList_SET_ITEM(result, i, taken);
    }
end:
    free(writes);
    Py_XDECREF(sockets);
    Py_XDECREF(bodies);
    return result;
}

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

static PyMethodDef methods[] = {
    {"receive", (PyCFunction)(void (*)(void))receive, METH_FASTCALL, receive_doc},
    {"join", (PyCFunction)(void (*)(void))join, METH_FASTCALL, join_doc},
    {"send_all", (PyCFunction)(void (*)(void))send_all, METH_FASTCALL, send_all_doc},
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
    .m_name = "_socketio",
    .m_doc = "Reads from, or writes to, many sockets in one call; puts responses together.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__socketio(void) { return PyModuleDef_Init(&definition); }
