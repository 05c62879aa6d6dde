/* What has come on many sockets, in one call, without the interpreter's lock: other threads run meanwhile. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/types.h>

/* Those beyond them have their turn when these have been answered as far as may be. */
#define MOST_SOCKETS 64

typedef struct {
    int socket;
    ssize_t size; /* bytes that have come; 0 at the end of what comes, -1 where it failed */
} Arrival;

PyDoc_STRVAR(receive_doc,
             "receive(epoll, room, most)\n--\n\n"
             "Read from the sockets of the epoll instance with the descriptor `epoll` that have something to be read,\n"
             "at most `most` bytes from each, and from as many as fit so in the bytearray `room`; the others are next.\n"
             "Returns pairs of a descriptor and the bytes, None where it has come to its end or failed.");

static PyObject *receive(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    if (given != 3 || !PyByteArray_CheckExact(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "receive takes a descriptor, a bytearray and a number");
        return NULL;
    }
    int epoll = (int)PyLong_AsLong(arguments[0]);
    Py_ssize_t most = PyLong_AsSsize_t(arguments[2]);
    if (PyErr_Occurred()) return NULL;
    Py_buffer room; /* keeps the bytearray where it is */
    if (PyObject_GetBuffer(arguments[1], &room, PyBUF_WRITABLE) < 0) return NULL;
    if (most < 1 || most > room.len) {
        PyErr_SetString(PyExc_ValueError, "most must be above 0, and fit in the room");
        PyBuffer_Release(&room);
        return NULL;
    }
    struct epoll_event events[MOST_SOCKETS];
    Arrival arrivals[MOST_SOCKETS];
    int ready, count = 0, failure = 0;
    char *place = room.buf;
    Py_ssize_t fit = room.len / most;
    Py_BEGIN_ALLOW_THREADS
    /* No more are asked for than are read from: those that it tells of go behind all the others. */
    ready = epoll_wait(epoll, events, fit < MOST_SOCKETS ? (int)fit : MOST_SOCKETS, 0);
    if (ready < 0) failure = errno;
    for (int i = 0; i < ready; i++) {
        ssize_t size;
        do
            size = recv(events[i].data.fd, place, (size_t)most, MSG_DONTWAIT);
        while (size < 0 && errno == EINTR);
        if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) continue;
        arrivals[count++] = (Arrival){events[i].data.fd, size};
        if (size > 0) place += size;
    }
    Py_END_ALLOW_THREADS
    PyObject *result = NULL;
    if (failure != 0 && failure != EINTR) {
        errno = failure;
        PyErr_SetFromErrno(PyExc_OSError);
        goto end;
    }
    result = PyList_New(count);
    place = room.buf;
    for (int i = 0; result != NULL && i < count; i++) {
        ssize_t size = arrivals[i].size;
        PyObject *pair = size > 0 ? Py_BuildValue("(iy#)", arrivals[i].socket, place, (Py_ssize_t)size)
                                  : Py_BuildValue("(iO)", arrivals[i].socket, Py_None);
        if (size > 0) place += size;
        if (pair == NULL) Py_CLEAR(result);
        else PyList_SET_ITEM(result, i, pair);
    }
end:
    PyBuffer_Release(&room);
    return result;
}

static PyMethodDef methods[] = {
    {"receive", (PyCFunction)(void (*)(void))receive, METH_FASTCALL, receive_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_batched_reads", "What has come on many sockets.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__batched_reads(void) { return PyModule_Create(&definition); }
