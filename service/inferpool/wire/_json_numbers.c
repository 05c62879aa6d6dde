/* Takes the lists of numbers out of a JSON body.

   Purpose. A JSON parser makes a Python object of every number, with the GIL held. `scan` reads a body once and
   writes its numbers, without objects, into one block of memory as binary64 or int64. It also writes the
   remainder: the body with a list of one string, the mark, in place of each list of numbers, however deep. No key
   of an object can look like this. `scan` judges only numbers and the lists around them; a parser that reads the
   remainder judges all else. json_numbers.py and json_bounds.py are the only callers, and work without this module.

   `count` counts the values that a parser would make objects of, so that a body can be refused before they are made.
   `has_null` tells whether an answer has a number that was not finite.
   `most_numbers` bounds the numbers that `scan` may find, so that their memory can be reserved before.

   GIL. `scan`, `count` and `most_numbers` release the GIL for bodies above RELEASE_BYTES and then touch no Python
   object: bodies and marks are bytes, which cannot change, or a buffer that is held, and the memory for the numbers
   is not yet known to anybody else. A buffer that its owner changes meanwhile gives wrong counts, nothing worse.
   `singles` keeps the GIL, because another thread could resize its bytearray; the caller passes few numbers. `prepare` is
   called once, at import; the powers are static, shared by all threads, and only read afterwards.

   Limits. `scan` takes no body (it returns None, and the caller parses the body) with an irregular list, with a
   list deeper than MOST_RANK, with more than MOST_LISTS lists, with an integer beyond int64, or with a number of
   more than MOST_DIGITS significant digits or a power of ten beyond MOST_POWER, nor with a remainder beyond
   MOST_REMAINDER. Its memory is that remainder, and 8 bytes for each of `most_numbers`. Nothing recurses.

   Decimals become binary64 by the algorithm of D. Lemire, "Number Parsing at a Gigabyte per Second" (Software:
   Practice and Experience 51(8), 2021). N. Mushtak and D. Lemire, "Fast Number Parsing Without Fallback" (2023),
   prove that one multiplication by 128 bits is enough. The powers of five come from Python. `scripts/fuzz` compares
   every number with orjson's.

   Needs integers of 128 bits and a little-endian processor. Elsewhere this file does not compile, setup.py leaves
   the module out, and orjson reads all bodies. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if !defined(__SIZEOF_INT128__) || !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "needs integers of 128 bits and a little-endian processor; without this module orjson reads all bodies"
#endif

enum {
    MOST_RANK = 32,            /* numpy 1 has no more dimensions */
    MOST_LISTS = 256,          /* no model has so many inputs, and each List takes a hundred times its bytes */
    MOST_REMAINDER = 1 << 20,  /* bytes; replacing the marks in more would take longer than reading with orjson */
    MOST_MARK = 24,            /* bytes of a mark without its text: brackets, quotes and a number */
    MOST_POWER = 128,          /* powers of ten from -MOST_POWER to MOST_POWER */
    MOST_DIGITS = 19,          /* every integer of so many digits fits in 64 bits */
    RELEASE_BYTES = 16 * 1024, /* reading a smaller body takes less time than waking another thread */
    EXACT_POWER = 22,          /* the largest power of ten that binary64 holds without rounding */
    STACK_BYTES = 12 * 1024,   /* of a remainder with its marks that needs no memory from the heap */
    STACK_NUMBERS = 512,       /* likewise, of a small body */
    STACK_LISTS = 4,
};

static const double exact_powers[EXACT_POWER + 1] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                                     1e8,  1e9,  1e10, 1e11, 1e12, 1e13, 1e14, 1e15,
                                                     1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
static const uint64_t small_powers[8] = {1, 10, 100, 1000, 10000, 100000, 1000000, 10000000};
static uint64_t powers[2 * MOST_POWER + 1][2]; /* 128 leading bits of 5^q, the upper half first */
static bool prepared = false;

typedef union {
    int64_t integer;
    double real;
} Number;

typedef struct {
    size_t first; /* index of its first number */
    size_t count;
    bool real; /* whether its numbers are binary64; else they are int64 */
    int rank;
    size_t shape[MOST_RANK];
} List;

typedef struct {
    const char *at, *end;
    char *copy;
    size_t room; /* bytes that may still be copied; marks are not counted */
    Number *numbers;
    size_t numbers_taken, most_numbers;
    List *lists; /* on the heap if there are more than the stack has room for */
    size_t lists_taken, lists_capacity;
    const char *mark;
    size_t mark_length;
    bool no_memory;
} Scan;

static const char *skip_space(const char *at, const char *end) {
    while (at < end && (*at == ' ' || *at == '\n' || *at == '\t' || *at == '\r')) at++;
    return at;
}

static bool is_digit(char c) { return (unsigned char)(c - '0') < 10; }

/* Sets `real` to w * 10^q, rounded to even; returns false if that needs more than one multiplication. */
static inline bool to_real(uint64_t w, int q, bool negative, double *real) {
    if (q <= 0 && q >= -EXACT_POWER && w >> 53 == 0) {
        /* Both are binary64 without rounding, so a division rounds once (Clinger 1990). */
        double quotient = (double)w / exact_powers[-q];
        *real = negative ? -quotient : quotient;
        return true;
    }
    uint64_t bits = 0;
    if (w != 0) {
        if (q < -MOST_POWER || q > MOST_POWER) return false;
        const uint64_t *power = powers[q + MOST_POWER];
        int zeros = __builtin_clzll(w);
        w <<= zeros;
        unsigned __int128 product = (unsigned __int128)w * power[0];
        uint64_t high = (uint64_t)(product >> 64), low = (uint64_t)product;
        if ((high & 0x1FF) == 0x1FF) { /* the lower bits may carry */
            uint64_t more = (uint64_t)((unsigned __int128)w * power[1] >> 64);
            low += more;
            if (low < more) high++;
        }
        int upper = (int)(high >> 63);
        uint64_t mantissa = high >> (upper + 9);
        int exponent = (((152170 + 65536) * q) >> 16) + 63 + upper - zeros + 1023;
        if (exponent <= 0 || exponent >= 2046) return false;
        /* Just half-way between two floats: round to the even one. */
        if (low <= 1 && q >= -4 && q <= 23 && (mantissa & 3) == 1 && mantissa << (upper + 9) == high)
            mantissa &= ~(uint64_t)1;
        mantissa = (mantissa + (mantissa & 1)) >> 1;
        if (mantissa >> 53) {
            mantissa = (uint64_t)1 << 52;
            exponent++;
        }
        bits = (mantissa & (((uint64_t)1 << 52) - 1)) | (uint64_t)exponent << 52;
    }
    bits |= (uint64_t)negative << 63;
    memcpy(real, &bits, sizeof bits);
    return true;
}

/* Appends the decimal digits at `at` to `value`. Bytes objects end with a NUL, which stops the loop. */
static inline const char *read_digits(const char *at, uint64_t *value) {
    uint64_t sum = *value;
    while (is_digit(*at)) sum = 10 * sum + (uint64_t)(*at++ - '0');
    *value = sum;
    return at;
}

/* The same for a fraction, eight digits at a time (Lemire, section 5), and then those that are left at once. */
static inline const char *read_fraction(const char *at, const char *end, uint64_t *value) {
    while (end - at >= 8) {
        uint64_t eight;
        memcpy(&eight, at, sizeof eight);
        eight ^= 0x3030303030303030; /* digits become 0 to 9, all else becomes more */
        uint64_t others = (((eight & 0x7F7F7F7F7F7F7F7F) + 0x7676767676767676) | eight) & 0x8080808080808080;
        int digits = others ? __builtin_ctzll(others) >> 3 : 8;
        if (!digits) return at;
        eight <<= 64 - 8 * digits; /* zeros lead */
        eight = eight * 10 + (eight >> 8);
        eight = (((eight & 0x000000FF000000FF) * 0x000F424000000064) +
                 (((eight >> 16) & 0x000000FF000000FF) * 0x0000271000000001)) >> 32;
        if (digits < 8) {
            *value = *value * small_powers[digits] + eight;
            return at + digits;
        }
        *value = *value * 100000000 + eight;
        at += 8;
    }
    return read_digits(at, value);
}

/* Where the numbers of a list are written. Apart from `List`, so that compilers keep it in registers. */
typedef struct {
    Number *first, *next, *stop;
    bool real;
} Cursor;

/* Reads one number (RFC 8259, section 6); returns NULL if there is none, or one beyond the limits. */
static inline const char *read_number(Cursor *cursor, const char *at, const char *end) {
    bool negative = at < end && *at == '-';
    const char *first = at += negative;
    uint64_t w = 0;
    at = read_digits(at, &w);
    Py_ssize_t digits = at - first;
    if (!digits || (digits > 1 && *first == '0')) return NULL;
    bool real = false;
    int q = 0;
    if (at < end && *at == '.') {
        real = true;
        const char *point = ++at;
        at = read_fraction(at, end, &w);
        if (at == point) return NULL;
        if (at - point > 400) return NULL;
        q = -(int)(at - point);
        digits += at - point;
    }
    if (digits > MOST_DIGITS) {
        /* Leading zeros need not fit. */
        const char *zero = first;
        while (*zero == '0' || *zero == '.') {
            digits -= *zero == '0';
            zero++;
        }
        if (digits > MOST_DIGITS) return NULL;
    }
    if (at < end && (*at == 'e' || *at == 'E')) {
        real = true;
        at++;
        bool minus = at < end && *at == '-';
        if (at < end && (*at == '-' || *at == '+')) at++;
        const char *start = at;
        uint64_t exponent = 0;
        at = read_digits(at, &exponent);
        if (at == start || at - start > 4) return NULL;
        q += minus ? -(int)exponent : (int)exponent;
    }
    Number *number = cursor->next;
    if (number == cursor->stop) return NULL;
    if (!real && w > INT64_MAX) return NULL;
    if (real && !cursor->real) {
        cursor->real = true;
        for (Number *before = cursor->first; before < number; before++) before->real = (double)before->integer;
    }
    cursor->next++;
    if (!cursor->real)
        number->integer = negative ? -(int64_t)w : (int64_t)w;
    else if (!real)
        number->real = negative ? (double)-(int64_t)w : (double)(int64_t)w;
    else if (!to_real(w, q, negative, &number->real))
        return NULL;
    return at;
}

/* Makes room for one more list than there is; returns false without memory. */
static bool grow_lists(Scan *scan) {
    size_t capacity = 2 * scan->lists_capacity + 8;
    bool on_heap = scan->lists_capacity > STACK_LISTS;
    List *lists = realloc(on_heap ? scan->lists : NULL, capacity * sizeof(List));
    if (lists == NULL) return false;
    if (!on_heap) memcpy(lists, scan->lists, scan->lists_taken * sizeof(List));
    scan->lists = lists;
    scan->lists_capacity = capacity;
    return true;
}

/* Reads the list that opens at `at`; returns NULL if it is not a regular list of numbers. */
static const char *read_list(Scan *scan, const char *at) {
    if (scan->lists_taken == MOST_LISTS) return NULL;
    if (scan->lists_taken == scan->lists_capacity && !grow_lists(scan)) {
        scan->no_memory = true;
        return NULL;
    }
    List *list = &scan->lists[scan->lists_taken];
    Number *first = scan->numbers + scan->numbers_taken;
    Cursor cursor = {.first = first, .next = first, .stop = scan->numbers + scan->most_numbers, .real = false};
    list->rank = 0;
    const char *end = scan->end;
    size_t counts[MOST_RANK] = {0}; /* elements so far in each open list */
    int depth = 0;
    for (;;) {
        while (at < end && *at == '[') { /* open lists, down to the numbers */
            if (depth == MOST_RANK || (list->rank && depth == list->rank)) return NULL;
            counts[depth++] = 0;
            at = skip_space(at + 1, end);
        }
        if (!list->rank) {
            list->rank = depth;
            memset(list->shape, 0, sizeof list->shape);
        } else if (depth != list->rank)
            return NULL;
        Number *before = cursor.next;
        for (;;) {
            at = read_number(&cursor, at, end);
            if (at == NULL) return NULL;
            if (at < end && *at == ',' && at + 1 < end && (is_digit(at[1]) || at[1] == '-')) {
                at++;
                continue;
            }
            at = skip_space(at, end);
            if (at < end && *at == ',') {
                at = skip_space(at + 1, end);
                continue;
            }
            break;
        }
        counts[depth - 1] = (size_t)(cursor.next - before);
        for (;;) { /* close lists, as far as they end here */
            if (at >= end || *at != ']') return NULL;
            depth--;
            if (!list->shape[depth])
                list->shape[depth] = counts[depth];
            else if (list->shape[depth] != counts[depth])
                return NULL;
            at++;
            if (!depth) {
                list->first = scan->numbers_taken;
                list->count = (size_t)(cursor.next - first);
                list->real = cursor.real;
                scan->numbers_taken += list->count;
                scan->lists_taken++;
                return at;
            }
            counts[depth - 1]++;
            at = skip_space(at, end);
            if (at < end && *at == ',') {
                at = skip_space(at + 1, end);
                if (at >= end || *at != '[') return NULL;
                break;
            }
        }
    }
}

static char *write_mark(Scan *scan, char *copy, size_t number) {
    char digits[MOST_MARK], *digit = digits + sizeof digits;
    do {
        *--digit = (char)('0' + number % 10);
        number /= 10;
    } while (number);
    *copy++ = '[';
    *copy++ = '"';
    memcpy(copy, scan->mark, scan->mark_length);
    copy += scan->mark_length;
    while (digit < digits + sizeof digits) *copy++ = *digit++;
    *copy++ = '"';
    *copy++ = ']';
    return copy;
}

/* Returns whether a number follows the brackets that open at `at`; `*inner` is set to the byte after them. */
static bool opens_numbers(const char *at, const char *end, const char **inner) {
    while (at < end && *at == '[') at = skip_space(at + 1, end);
    *inner = at;
    return at < end && (is_digit(*at) || *at == '-');
}

static inline bool take_room(Scan *scan, size_t size) {
    if (scan->room < size) return false;
    scan->room -= size;
    return true;
}

static bool scan_body(Scan *scan) {
    const char *at = scan->at, *end = scan->end, *inner;
    char *copy = scan->copy;
    while (at < end) {
        char c = *at;
        if (c == '"') {
            const char *start = at++;
            while (at < end && *at != '"') at += *at == '\\' ? 2 : 1;
            at = at < end ? at + 1 : end;
            if (!take_room(scan, (size_t)(at - start))) return false;
            memcpy(copy, start, (size_t)(at - start));
            copy += at - start;
        } else if (c == '[') {
            if (opens_numbers(at, end, &inner)) {
                at = read_list(scan, at);
                if (at == NULL) return false;
                copy = write_mark(scan, copy, scan->lists_taken - 1);
            } else {
                if (!take_room(scan, (size_t)(inner - at))) return false;
                memcpy(copy, at, (size_t)(inner - at));
                copy += inner - at;
                at = inner;
            }
        } else {
            if (!take_room(scan, 1)) return false;
            *copy++ = c;
            at++;
        }
    }
    scan->copy = copy;
    return true;
}

static PyObject *list_as_tuple(const List *list) {
    PyObject *described = PyTuple_New(4), *shape = PyTuple_New(list->rank);
    PyObject *first = PyLong_FromSize_t(list->first * sizeof(Number)), *count = PyLong_FromSize_t(list->count);
    bool complete = described != NULL && shape != NULL && first != NULL && count != NULL;
    for (int axis = 0; complete && axis < list->rank; axis++) {
        PyObject *size = PyLong_FromSize_t(list->shape[axis]);
        complete = size != NULL;
        if (complete) PyTuple_SET_ITEM(shape, axis, size);
    }
    if (!complete) {
        Py_XDECREF(described);
        Py_XDECREF(shape);
        Py_XDECREF(first);
        Py_XDECREF(count);
        return NULL;
    }
    PyTuple_SET_ITEM(described, 0, Py_NewRef(list->real ? Py_True : Py_False));
    PyTuple_SET_ITEM(described, 1, first);
    PyTuple_SET_ITEM(described, 2, count);
    PyTuple_SET_ITEM(described, 3, shape);
    return described;
}

static PyObject *lists_as_list(const Scan *scan) {
    PyObject *lists = PyList_New((Py_ssize_t)scan->lists_taken);
    for (size_t i = 0; lists != NULL && i < scan->lists_taken; i++) {
        PyObject *one = list_as_tuple(&scan->lists[i]);
        if (one == NULL)
            Py_CLEAR(lists);
        else
            PyList_SET_ITEM(lists, (Py_ssize_t)i, one);
    }
    return lists;
}

PyDoc_STRVAR(scan_doc,
             "scan(body, mark, most=len(body) // 2 + 1)\n--\n\n"
             "Take the lists of numbers, of at most `most` numbers in all, out of `body`.\n\n"
             "Returns the body with `[\"MARKn\"]` in place of the nth list, the memory with all numbers, and a tuple for\n"
             "each list: whether it holds binary64 or else int64, the offset in bytes of its first number, the count of\n"
             "its numbers, and its shape. Returns None if a list is irregular, or something is beyond the limits.");

static PyObject *scan(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    if (given < 2 || given > 3 || !PyBytes_Check(arguments[0]) || !PyBytes_Check(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "scan takes two bytes objects, and a number");
        return NULL;
    }
    if (!prepared) {
        PyErr_SetString(PyExc_RuntimeError, "prepare must be called first");
        return NULL;
    }
    const char *body = PyBytes_AS_STRING(arguments[0]);
    size_t length = (size_t)PyBytes_GET_SIZE(arguments[0]);
    Scan state = {.at = body,
                  .end = body + length,
                  .mark = PyBytes_AS_STRING(arguments[1]),
                  .mark_length = (size_t)PyBytes_GET_SIZE(arguments[1]),
                  .room = length < MOST_REMAINDER ? length : MOST_REMAINDER,
                  /* Each number takes at least two characters, with the comma or bracket after it. */
                  .most_numbers = length / 2 + 1};
    if (given == 3) {
        size_t most = PyLong_AsSize_t(arguments[2]);
        if (PyErr_Occurred()) return NULL;
        if (most < state.most_numbers) state.most_numbers = most;
    }
    /* A small body needs no memory but that of its result. */
    char few_bytes[STACK_BYTES];
    Number few_numbers[STACK_NUMBERS];
    List few_lists[STACK_LISTS];
    state.lists = few_lists;
    state.lists_capacity = STACK_LISTS;
    /* A list may be shorter than its mark. */
    size_t most_bytes = state.room + MOST_LISTS * (state.mark_length + MOST_MARK);
    char *remainder = most_bytes <= sizeof few_bytes ? few_bytes : malloc(most_bytes);
    bool is_small = state.most_numbers <= STACK_NUMBERS, complete = false;
    PyObject *memory =
        is_small ? NULL : PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(state.most_numbers * sizeof(Number)));
    if (remainder != NULL && (is_small || memory != NULL)) {
        state.copy = remainder;
        state.numbers = is_small ? few_numbers : (Number *)(void *)PyByteArray_AS_STRING(memory);
        PyThreadState *released = length > RELEASE_BYTES ? PyEval_SaveThread() : NULL;
        complete = scan_body(&state);
        if (released != NULL) PyEval_RestoreThread(released);
    }
    PyObject *result = NULL;
    Py_ssize_t taken = (Py_ssize_t)(state.numbers_taken * sizeof(Number));
    if (complete && is_small) memory = PyByteArray_FromStringAndSize((const char *)few_numbers, taken);
    if (remainder == NULL || state.no_memory)
        PyErr_NoMemory();
    else if (!PyErr_Occurred() && !complete)
        result = Py_NewRef(Py_None);
    else if (memory != NULL && (is_small || PyByteArray_Resize(memory, taken) == 0)) {
        PyObject *rest = PyBytes_FromStringAndSize(remainder, state.copy - remainder);
        PyObject *lists = rest != NULL ? lists_as_list(&state) : NULL;
        if (lists != NULL) result = PyTuple_Pack(3, rest, memory, lists);
        Py_XDECREF(rest);
        Py_XDECREF(lists);
    }
    Py_XDECREF(memory);
    if (remainder != few_bytes) free(remainder);
    if (state.lists != few_lists) free(state.lists);
    return result;
}

/* The values in a text, as a parser makes objects of them. */
typedef struct {
    size_t lists, objects, strings, numbers, literals, text_bytes, depth;
} Counts;

/* Counts the string that opens at `at`, and returns what follows it. Its characters take as many bytes each as the
   widest of them: 1 below U+0100, 2 below U+10000, else 4. Escapes count as 2, and as 4 in a pair of surrogates. */
static const char *count_string(Counts *counts, const char *at, const char *end) {
    size_t characters = 0, width = 1;
    at++;
    while (at < end && *at != '"') {
        unsigned char c = (unsigned char)*at;
        if (c == '\\') {
            if (end - at > 3 && at[1] == 'u') {
                size_t wide = (at[2] == 'd' || at[2] == 'D') && at[3] > '7' ? 4 : 2;
                if (wide > width) width = wide;
            }
            at++; /* the escaped character may be a quote */
            characters++;
        } else if (c >= 0xC0) {
            size_t wide = c >= 0xF0 ? 4 : c >= 0xC4 ? 2 : 1;
            if (wide > width) width = wide;
            characters++;
        } else if (c < 0x80)
            characters++;
        at++;
    }
    counts->strings++;
    counts->text_bytes += characters * width;
    return at < end ? at + 1 : end;
}

static void count_values(Counts *counts, const char *at, const char *end) {
    size_t depth = 0;
    while (at < end) {
        char c = *at;
        if (c == '"') {
            at = count_string(counts, at, end);
            continue;
        }
        at++;
        if (c == '[' || c == '{') {
            *(c == '[' ? &counts->lists : &counts->objects) += 1;
            if (++depth > counts->depth) counts->depth = depth;
        } else if (c == ']' || c == '}')
            depth -= depth > 0;
        else if (is_digit(c) || c == '-') {
            counts->numbers++;
            while (at < end && (is_digit(*at) || *at == '.' || *at == 'e' || *at == 'E' || *at == '+' || *at == '-'))
                at++;
        } else if (c == 't' || c == 'f' || c == 'n') {
            counts->literals++;
            while (at < end && *at >= 'a' && *at <= 'z') at++;
        }
    }
}

PyDoc_STRVAR(count_doc,
             "count(text)\n--\n\n"
             "Count the values in the JSON of a bytes-like object; whether it is JSON is not checked.\n\n"
             "Returns how many lists, objects, strings (with the keys of objects), numbers and literals there are, the\n"
             "bytes of memory that the characters of all strings take in Python, and how deep containers are nested.");

static PyObject *count(PyObject *module, PyObject *given) {
    (void)module;
    Py_buffer text;
    if (PyObject_GetBuffer(given, &text, PyBUF_SIMPLE) < 0) return NULL;
    Counts counts = {0};
    const char *first = text.buf;
    PyThreadState *released = text.len > RELEASE_BYTES ? PyEval_SaveThread() : NULL;
    if (text.len) count_values(&counts, first, first + text.len);
    if (released != NULL) PyEval_RestoreThread(released);
    PyBuffer_Release(&text);
    return Py_BuildValue("(nnnnnnn)", (Py_ssize_t)counts.lists, (Py_ssize_t)counts.objects, (Py_ssize_t)counts.strings,
                         (Py_ssize_t)counts.numbers, (Py_ssize_t)counts.literals, (Py_ssize_t)counts.text_bytes,
                         (Py_ssize_t)counts.depth);
}

PyDoc_STRVAR(most_numbers_doc,
             "most_numbers(body)\n--\n\n"
             "Return a number that the numbers in the lists of a JSON body do not exceed.");

static PyObject *most_numbers(PyObject *module, PyObject *given) {
    (void)module;
    if (!PyBytes_Check(given)) {
        PyErr_SetString(PyExc_TypeError, "most_numbers takes a bytes object");
        return NULL;
    }
    const char *body = PyBytes_AS_STRING(given);
    size_t length = (size_t)PyBytes_GET_SIZE(given), most = 0;
    PyThreadState *released = length > RELEASE_BYTES ? PyEval_SaveThread() : NULL;
    /* A comma or a bracket follows each number. Compilers make this loop count many bytes at a time if the inner
       counter cannot overflow its byte. */
    for (size_t start = 0; start < length;) {
        size_t stop = length - start < 255 ? length : start + 255;
        uint8_t few = 0;
        for (; start < stop; start++) few = (uint8_t)(few + (body[start] == ',' || body[start] == ']'));
        most += few;
    }
    if (released != NULL) PyEval_RestoreThread(released);
    return PyLong_FromSize_t(most);
}

PyDoc_STRVAR(singles_doc,
             "singles(memory, start, count, real)\n--\n\n"
             "Return `count` numbers as binary32, from the byte `start` of `memory` on.\n\n"
             "The numbers are binary64 if `real`, else int64. Returns None if one is out of the range of binary32.");

static PyObject *singles(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    if (given != 4 || !PyByteArray_Check(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "singles takes a bytearray, two integers and a boolean");
        return NULL;
    }
    Py_ssize_t start = PyLong_AsSsize_t(arguments[1]), count = PyLong_AsSsize_t(arguments[2]);
    Py_ssize_t size = PyByteArray_GET_SIZE(arguments[0]);
    if (PyErr_Occurred()) return NULL;
    if (start < 0 || count < 0 || start > size || count > (size - start) / (Py_ssize_t)sizeof(Number)) {
        PyErr_SetString(PyExc_ValueError, "start and count must be within the memory");
        return NULL;
    }
    const char *first = PyByteArray_AS_STRING(arguments[0]) + start;
    if ((uintptr_t)first % _Alignof(Number) != 0) {
        PyErr_SetString(PyExc_ValueError, "start must be a multiple of 8 bytes");
        return NULL;
    }
    PyObject *narrow = PyByteArray_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(float));
    if (narrow == NULL) return NULL;
    const Number *from = (const Number *)(const void *)first;
    float *to = (float *)(void *)PyByteArray_AS_STRING(narrow);
    bool finite = true;
    if (arguments[3] == Py_True) {
        for (Py_ssize_t i = 0; i < count; i++) {
            to[i] = (float)from[i].real;
            finite &= to[i] - to[i] == 0;
        }
    } else {
        for (Py_ssize_t i = 0; i < count; i++) to[i] = (float)(double)from[i].integer;
    }
    if (!finite) {
        Py_DECREF(narrow);
        Py_RETURN_NONE;
    }
    return narrow;
}

PyDoc_STRVAR(has_null_doc,
             "has_null(text)\n--\n\n"
             "Return whether `null` is anywhere in the bytes `text`. `in` takes seven instructions a byte.");

static PyObject *has_null(PyObject *module, PyObject *given) {
    (void)module;
    if (!PyBytes_Check(given)) {
        PyErr_SetString(PyExc_TypeError, "has_null takes a bytes object");
        return NULL;
    }
    const char *at = PyBytes_AS_STRING(given), *end = at + PyBytes_GET_SIZE(given);
    while (end - at >= 4 && (at = memchr(at, 'n', (size_t)(end - at))) != NULL) {
        if (end - at >= 4 && memcmp(at, "null", 4) == 0) Py_RETURN_TRUE;
        at++;
    }
    Py_RETURN_FALSE;
}

PyDoc_STRVAR(prepare_doc,
             "prepare(powers)\n--\n\n"
             "Set the 128 leading bits of 5**q for q from -MOST_POWER to MOST_POWER, as 64-bit integers with the\n"
             "upper half first. Must be called once, before any `scan`.");

static PyObject *prepare(PyObject *module, PyObject *given) {
    (void)module;
    if (!PyBytes_Check(given) || PyBytes_GET_SIZE(given) != sizeof powers) {
        PyErr_SetString(PyExc_ValueError, "prepare takes two integers of 64 bits for each power");
        return NULL;
    }
    memcpy(powers, PyBytes_AS_STRING(given), sizeof powers);
    prepared = true;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"scan", (PyCFunction)(void (*)(void))scan, METH_FASTCALL, scan_doc},
    {"singles", (PyCFunction)(void (*)(void))singles, METH_FASTCALL, singles_doc},
    {"count", count, METH_O, count_doc},
    {"most_numbers", most_numbers, METH_O, most_numbers_doc},
    {"has_null", has_null, METH_O, has_null_doc},
    {"prepare", prepare, METH_O, prepare_doc},
    {NULL, NULL, 0, NULL},
};

static int add_constants(PyObject *module) { return PyModule_AddIntMacro(module, MOST_POWER); }

static PyModuleDef_Slot slots[] = {{Py_mod_exec, add_constants}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_json_numbers",
    .m_doc = "Takes the lists of numbers out of a JSON body.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__json_numbers(void) { return PyModuleDef_Init(&definition); }
