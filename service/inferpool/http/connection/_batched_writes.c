/* Bytes to many sockets in one call, without the interpreter's lock: other threads run meanwhile.

   What a socket does not take at once, or at all, is left to the caller. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/types.h>

typedef struct {
    int socket;
    const char *data;
    size_t length;
    ssize_t taken;
} Shot;

PyDoc_STRVAR(send_all_doc,
             "send_all(sockets, bodies)\n--\n\n"
             "Send to each of `sockets`, a list of descriptors, the bytes at the same place of the list `bodies`.\n"
             "Returns how many bytes each has taken: fewer than there are where it is full, 0 where it failed.");

static PyObject *send_all(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    if (given != 2 || !PyList_CheckExact(arguments[0]) || !PyList_CheckExact(arguments[1]) ||
        PyList_GET_SIZE(arguments[0]) != PyList_GET_SIZE(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "send_all takes two lists of one length");
        return NULL;
    }
    /* Copies of the lists: they keep the bytes, whatever other threads do to the lists meanwhile. */
    PyObject *sockets = PyList_AsTuple(arguments[0]), *bodies = PyList_AsTuple(arguments[1]);
    PyObject *result = NULL;
    Shot *shots = NULL;
    if (sockets == NULL || bodies == NULL) goto end;
    Py_ssize_t count = PyTuple_GET_SIZE(sockets);
    shots = calloc(count > 0 ? (size_t)count : 1, sizeof(Shot));
    if (shots == NULL) {
        PyErr_NoMemory();
        goto end;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *body = PyTuple_GET_ITEM(bodies, i);
        long socket = PyLong_AsLong(PyTuple_GET_ITEM(sockets, i));
        if (PyErr_Occurred()) goto end;
        if (!PyBytes_Check(body) || socket < 0 || socket > INT_MAX) {
            PyErr_SetString(PyExc_TypeError, "send_all sends bytes to descriptors");
            goto end;
        }
        shots[i] = (Shot){(int)socket, PyBytes_AS_STRING(body), (size_t)PyBytes_GET_SIZE(body), 0};
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++) {
        do
            shots[i].taken = send(shots[i].socket, shots[i].data, shots[i].length, MSG_DONTWAIT | MSG_NOSIGNAL);
        while (shots[i].taken < 0 && errno == EINTR);
    }
    Py_END_ALLOW_THREADS
    result = PyList_New(count);
    for (Py_ssize_t i = 0; result != NULL && i < count; i++) {
        PyObject *taken = PyLong_FromSsize_t(shots[i].taken > 0 ? (Py_ssize_t)shots[i].taken : 0);
        if (taken == NULL) Py_CLEAR(result);
        else PyList_SET_ITEM(result, i, taken);
    }
end:
    free(shots);
    Py_XDECREF(sockets);
    Py_XDECREF(bodies);
    return result;
}

static PyMethodDef methods[] = {
    {"send_all", (PyCFunction)(void (*)(void))send_all, METH_FASTCALL, send_all_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_batched_writes", "Bytes to many sockets in one call.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__batched_writes(void) { return PyModule_Create(&definition); }
