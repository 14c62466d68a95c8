"""Numbers that are copied from device memory to shared memory by words of four bytes, the least that is copied: numbers
of two bytes with their neighbours.
"""

from __future__ import annotations

WORDS = """

@gluon.jit
def word_of(pointer):
    # The word that a number lies in, and whether it is the second one there.
    if pointer.dtype.element_ty == gl.float32:
        return pointer.to(gl.pointer_type(gl.int32)), 0
    else:
        second = gl.cast(pointer.to(gl.int64) >> 1, gl.int32) & 1
        return (pointer - second).to(gl.pointer_type(gl.int32)), second


@gluon.jit
def words(pointer, numbers):
    # How many words so many numbers are.
    if pointer.dtype.element_ty == gl.float32:
        return numbers
    else:
        return numbers >> 1


@gluon.jit
def number_in(pointer, word, place):
    # The number of a word that is at a place, counted from the first number of the first word.
    if pointer.dtype.element_ty == gl.float32:
        return word.to(gl.float32, bitcast=True)
    elif pointer.dtype.element_ty == gl.bfloat16:
        return (word >> (gl.cast(place & 1, gl.int32) << 4) << 16).to(gl.float32, bitcast=True)
    else:
        half = (word >> (gl.cast(place & 1, gl.int32) << 4)).to(gl.int16)
        return half.to(gl.float16, bitcast=True).to(gl.float32)

"""
