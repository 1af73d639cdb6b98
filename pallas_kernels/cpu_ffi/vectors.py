"""LLVM code from Python expressions: what kernels for CPUs are written with.

A `Code` writes into one function. Vectors are as long as a kernel wants them, and LLVM cuts them into what the
processor has. Nothing is reordered: sums are added as they are written, so that a number's bits follow from the kernel
alone.
"""

from __future__ import annotations

import contextlib
import functools
import math
import platform
from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import binding, ir

BYTE, HALF_WORD, WORD, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT, POINTER = ir.FloatType(), ir.PointerType()
#: numbers of the vectors that kernels compute with
LANES = 16

Value = Any


@functools.cache
def has_wide_pairs() -> bool:
    """Whether this processor adds 32 products of 16 bits to their neighbours in one instruction (AVX-512BW)."""
    return platform.machine() == "x86_64" and bool(binding.get_host_cpu_features().get("avx512bw"))


class Code:
    """Writes the code of a function.

    Args:
        arguments: types of its arguments.
        public: whether other modules may call it.
    """

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[ir.Type], *, public: bool = False):
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
        if not public:
            self.function.linkage = "internal"
        self._module = module
        self.builder = ir.IRBuilder(self.function.append_basic_block())

    @property
    def arguments(self) -> Sequence[Value]:
        return self.function.args

    def end(self) -> None:
        self.builder.ret_void()

    # ---- integers

    def number(self, value: int) -> Value:
        return ir.Constant(LONG, value)

    def add(self, a: Value, b: Value | int) -> Value:
        return self.builder.add(a, self.number(b) if isinstance(b, int) else b)

    def subtract(self, a: Value, b: Value | int) -> Value:
        return self.builder.sub(a, self.number(b) if isinstance(b, int) else b)

    def times(self, a: Value, b: Value | int) -> Value:
        return self.builder.mul(a, self.number(b) if isinstance(b, int) else b)

    def divided(self, a: Value, b: Value | int) -> Value:
        return self.builder.udiv(a, self.number(b) if isinstance(b, int) else b)

    def below(self, a: Value, b: Value) -> Value:
        return self.builder.icmp_signed("<", a, b)

    def smaller(self, a: Value, b: Value) -> Value:
        return self.builder.select(self.below(a, b), a, b)

    def greater(self, a: Value, b: Value) -> Value:
        return self.builder.select(self.below(a, b), b, a)

    # ---- memory

    def at(self, base: Value, offset: Value | int) -> Value:
        """The address so many bytes further."""
        offset = self.number(offset) if isinstance(offset, int) else offset
        return self.builder.gep(base, [offset], source_etype=BYTE)

    def scratch(self, count: int) -> Value:
        """Room for float32 numbers until the function ends. To be called before loops."""
        memory: Any = self.builder.alloca(ir.ArrayType(FLOAT, count))
        memory.align = 64
        memory.type = POINTER  # which llvmlite would have typed
        return memory

    def allocated(self, size: Value) -> Value:
        """So many bytes, until `free`, from the beginning of a cache line on: vectors lie across none."""
        lines = self.times(self.divided(self.add(size, 63), 64), 64)
        return self.builder.call(self.declared("aligned_alloc", POINTER, [LONG, LONG]), [self.number(64), lines])

    def free(self, memory: Value) -> None:
        self.builder.call(self.declared("free", ir.VoidType(), [POINTER]), [memory])

    def load(self, address: Value, kind: ir.Type, align: int | None = None) -> Value:
        return self.builder.load(address, align=align, typ=kind)

    def bytes(self, address: Value, count: int) -> Value:
        """So many bytes, <count x i8>."""
        return self.load(address, ir.VectorType(BYTE, count), align=1)

    def floats(self, address: Value, count: int = LANES) -> Value:
        """So many float32 numbers, <count x float>."""
        return self.load(address, ir.VectorType(FLOAT, count), align=4)

    def half_words(self, address: Value, count: int = LANES) -> Value:
        """So many integers of 16 bits, <count x i16>."""
        return self.load(address, ir.VectorType(HALF_WORD, count), align=2)

    def store(self, value: Value, address: Value) -> None:
        number = value.type.element if isinstance(value.type, ir.VectorType) else value.type
        self.builder.store(value, address, align=2 if number == HALF_WORD else 4)

    def store_first(self, count: Value, vector: Value, address: Value) -> None:
        """Write the first `count` (i64, of any sign) numbers of a vector, which may be fewer than it has, or more."""
        kind = vector.type
        places = ir.Constant(ir.VectorType(WORD, kind.count), list(range(kind.count)))
        least, most = self.number(0), self.number(kind.count)
        some = self.builder.trunc(self.smaller(self.greater(count, least), most), WORD)
        mask = self.builder.icmp_signed("<", places, self.splat(some, kind.count))
        number = {FLOAT: "f32", HALF_WORD: "i16"}[kind.element]
        arguments = [kind, POINTER, WORD, mask.type]
        function = self.declared(f"llvm.masked.store.v{kind.count}{number}.p0", ir.VoidType(), arguments)
        align = 4 if kind.element == FLOAT else 2
        self.builder.call(function, [vector, address, ir.Constant(WORD, align), mask])

    def half(self, address: Value) -> Value:
        """The float16 there, as float32."""
        bits = self.load(address, HALF_WORD, align=1)
        return self.builder.fpext(self.builder.bitcast(bits, ir.HalfType()), FLOAT)

    def number_of(self, address: Value, dtype: str) -> Value:
        """The number there, of a dtype of 16 bits or float32, as float32."""
        if dtype == "float16":
            return self.half(address)
        if dtype == "float32":
            return self.load(address, FLOAT, align=4)
        bits = self.builder.zext(self.load(address, HALF_WORD, align=2), WORD)
        return self.builder.bitcast(self.shifted_up(bits, 16), FLOAT)

    def numbers_of(self, address: Value, dtype: str) -> Value:
        """The next `LANES` numbers of a dtype of 16 bits or float32, as float32."""
        if dtype == "float32":
            return self.floats(address)
        bits = self.half_words(address)
        if dtype == "float16":
            halves = self.builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES))
            return self.builder.fpext(halves, ir.VectorType(FLOAT, LANES))
        wide = self.shifted_up(self.builder.zext(bits, ir.VectorType(WORD, LANES)), 16)
        return self.builder.bitcast(wide, ir.VectorType(FLOAT, LANES))

    def e4m3(self, address: Value, count: int = 32) -> Value:
        """The next numbers of float8_e4m3fn, a 256th of each, <count x half>: sign, exponent and fraction in their
        places of a float16, whose exponents are 8 larger; all ones but for the sign is no number.
        """
        # the sign comes twice, of which the lower one is the exponent's highest bit
        bits = self.masked(self.shifted_up(self.widened(self.bytes(address, count), HALF_WORD), 7), 0xBFFF)
        nothing = self.builder.icmp_unsigned("==", self.masked(bits, 0x3F80), self.all(0x3F80, bits))
        bits = self.builder.select(nothing, self.all(0x7E00, bits), bits)
        return self.builder.bitcast(bits, ir.VectorType(ir.HalfType(), count))

    def byte(self, address: Value) -> Value:
        """The byte there, i32 0..255."""
        return self.builder.zext(self.load(address, BYTE), WORD)

    # ---- vectors

    def splat(self, value: Value, count: int = LANES) -> Value:
        vector = ir.VectorType(value.type, count)
        first = self.builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(WORD, 0))
        zeros = ir.Constant(ir.VectorType(WORD, count), [0] * count)
        return self.builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)

    def all(self, value: int, like: Value) -> Value:
        """A vector, or number, of this type of nothing but a constant."""
        kind = like.type
        return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)

    def part(self, vector: Value, first: int, count: int = LANES) -> Value:
        """Some neighbours of a vector's numbers."""
        return vector if (first, count) == (0, vector.type.count) else self.picked(vector, range(first, first + count))

    def joined(self, a: Value, b: Value) -> Value:
        """The numbers of two vectors, one behind the other."""
        places = ir.Constant(ir.VectorType(WORD, 2 * a.type.count), list(range(2 * a.type.count)))
        return self.builder.shuffle_vector(a, b, places)

    def picked(self, vector: Value, places: Sequence[int]) -> Value:
        """A vector's numbers at some places, as a vector."""
        return self.chosen(vector, ir.Constant(vector.type, ir.Undefined), places)

    def chosen(self, a: Value, b: Value, places: Sequence[int]) -> Value:
        """Numbers of two vectors, at some places of both, one behind the other."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(WORD, len(places)), list(places)))

    def spread(self, vector: Value) -> Value:
        """Eight integers of 16 bits, four times, for `spread_over`."""
        lanes = self.picked(vector, list(range(8)) * 4)
        if not has_wide_pairs():
            return lanes
        # that the four are alike is hidden from LLVM
        kind = ir.FunctionType(lanes.type, [lanes.type])
        return self.builder.call(ir.InlineAsm(kind, "", "=v,0"), [lanes])

    def spread_over(self, spread: Value, places: Sequence[int]) -> Value:
        """The integers of `spread` at 32 places 0..7, <32 x i16>: in one instruction with AVX-512BW, which does not
        leave its 128 bits. For permutations of all 512 bits from bytes LLVM takes three, and copies.
        """
        return self.picked(spread, [place + i // 8 * 8 for i, place in enumerate(places)])

    def prefetch(self, address: Value, cache: int = 1) -> None:
        """Ask for the cache line there, which may be nobody's memory, into a core's first or second cache."""
        kinds = [POINTER, WORD, WORD, WORD]
        function = self.declared("llvm.prefetch.p0", ir.VoidType(), kinds)
        self.builder.call(function, [address, *(ir.Constant(WORD, i) for i in (0, 4 - cache, 1))])

    def numbers(self, vector: Value) -> list[Value]:
        """A vector's numbers, one by one."""
        return [self.builder.extract_element(vector, ir.Constant(WORD, i)) for i in range(vector.type.count)]

    def looked_up(self, table: Sequence[int], places: Value) -> Value:
        """Of a table of sixteen integers, <16 x i8>, the numbers at places 0..15, <16 x i8>."""
        kind = places.type
        numbers = ir.Constant(kind, list(table))
        if platform.machine() == "x86_64":
            function = self.declared("llvm.x86.ssse3.pshuf.b.128", kind, [kind, kind])
        else:
            function = self.declared("llvm.aarch64.neon.tbl1.v16i8", kind, [kind, kind])
        return self.builder.call(function, [numbers, places])

    def looked_up_floats(self, table: Value, places: Value) -> Value:
        """Of a table, <16 x float>, the numbers at places 0..15, <16 x i8>: <16 x float>."""
        builder, words = self.builder, ir.VectorType(WORD, 16)
        index: Value = builder.zext(places, words)
        if has_wide_pairs():
            name = "llvm.x86.avx512.permvar.sf.512"
            return builder.call(self.declared(name, table.type, [table.type, words]), [table, index])
        # a tree of choices by one bit after the other
        found: list[Value] = [self.splat(builder.extract_element(table, ir.Constant(WORD, i))) for i in range(16)]
        for bit in range(4):
            has = builder.icmp_unsigned("!=", self.masked(index, 1 << bit), self.all(0, index))
            found = [builder.select(has, b, a) for a, b in zip(found[::2], found[1::2], strict=True)]
        return found[0]

    def parts(self, vector: Value, count: int = LANES) -> list[Value]:
        """A vector in parts of so many numbers."""
        return [self.part(vector, first, count) for first in range(0, vector.type.count, count)]

    def masked(self, value: Value, mask: int) -> Value:
        return self.builder.and_(value, self.all(mask, value))

    def shifted_down(self, value: Value, bits: int) -> Value:
        return self.builder.lshr(value, self.all(bits, value)) if bits else value

    def shifted_up(self, value: Value, bits: int) -> Value:
        return self.builder.shl(value, self.all(bits, value)) if bits else value

    def bits(self, address: Value, count: int = 16) -> Value:
        """The bits of two bytes from the lowest, each as a byte of all ones or of none, <count x i8>."""
        word = self.splat(self.load(address, HALF_WORD, align=1), count)
        places = ir.Constant(word.type, [1 << i for i in range(count)])
        found = self.builder.icmp_unsigned("!=", self.builder.and_(word, places), self.all(0, word))
        return self.builder.sext(found, ir.VectorType(BYTE, count))

    def less(self, value: Value, amount: int) -> Value:
        return self.builder.sub(value, self.all(amount, value))

    def signed(self, value: Value) -> Value:
        """Integers with a sign, as float32."""
        return self.builder.sitofp(value, _with_numbers(value.type, FLOAT))

    def widened(self, value: Value, number: ir.Type) -> Value:
        """Integers with a sign, in more bits."""
        return self.builder.sext(value, _with_numbers(value.type, number))

    def pairs(self, a: Value, b: Value) -> Value:
        """Products of two vectors of i16, each added to its neighbour: half as many i32."""
        half = a.type.count // 2
        result = ir.VectorType(WORD, half)
        names = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
        if half == 16 and not has_wide_pairs():
            return self.joined(*(self.pairs(*(self.part(each, at, 16) for each in (a, b))) for at in (0, 16)))
        if half in names and platform.machine() == "x86_64":
            return self.builder.call(self.declared(names[half], result, [a.type, b.type]), [a, b])
        products: Value = self.builder.mul(self.widened(a, WORD), self.widened(b, WORD))
        even, odd = (ir.Constant(result, [2 * i + first for i in range(half)]) for first in (0, 1))
        nothing = ir.Constant(products.type, ir.Undefined)
        left, right = (self.builder.shuffle_vector(products, nothing, places) for places in (even, odd))
        return self.builder.add(left, right)

    def bfloat16_pairs(self, a: Value, b: Value, total: Value) -> Value:
        """``total`` <16 x float>, with the products of two vectors of bfloat16, <32 x i16>, each added to its
        neighbour's; of processors with AVX512-BF16.
        """
        kind = ir.VectorType(_BFloat16(), 32)
        numbers = [self.builder.bitcast(vector, kind) for vector in (a, b)]
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return self.builder.call(self.declared(name, total.type, [total.type, kind, kind]), [total, *numbers])

    def bytes_by_bytes(self, unsigned: Value, signed: Value, total: Value) -> Value:
        """``total`` <16 x i32> or <8 x i32>, with the products of bytes without and with a sign, of which four lie in
        each number of two such vectors; of processors with AVX-512 VNNI, or of eight with AVX-VNNI.
        """
        kind = total.type
        function = self.declared(f"llvm.x86.avx512.vpdpbusd.{32 * kind.count}", kind, [kind] * 3)
        return self.builder.call(function, [total, unsigned, signed])

    def rounded(self, numbers: Value, *, flushes: bool = False) -> Value:
        """Of a vector of float32 numbers the nearest bfloat16 ones, of two the even one, <count x i16>.

        Args:
            flushes: whether those that are no normal float32 become zeros: by AVX512-BF16's instructions, of 16 or 32.
        """
        result = _with_numbers(numbers.type, HALF_WORD)
        if flushes:
            kind, parts = ir.VectorType(_BFloat16(), numbers.type.count), self.parts(numbers)
            name = f"llvm.x86.avx512bf16.{'cvtneps2bf16' if len(parts) == 1 else 'cvtne2ps2bf16'}.512"
            function = self.declared(name, kind, [part.type for part in parts])
            return self.builder.bitcast(self.builder.call(function, parts[::-1]), result)
        bits: Value = self.builder.bitcast(numbers, _with_numbers(numbers.type, WORD))
        high = self.shifted_down(bits, 16)
        half = self.builder.add(self.masked(high, 1), self.all(0x7FFF, bits))
        nearest = self.shifted_down(self.builder.add(bits, half), 16)
        is_nan = self.builder.fcmp_unordered("uno", numbers, numbers)
        quiet = self.builder.or_(high, self.all(0x40, bits))
        return self.builder.trunc(self.builder.select(is_nan, quiet, nearest), result)

    def unsigned(self, value: Value) -> Value:
        return self.builder.uitofp(value, _with_numbers(value.type, FLOAT))

    # ---- float32

    def multiplied(self, a: Value, b: Value) -> Value:
        return self.builder.fmul(a, b)

    def summed(self, a: Value, b: Value) -> Value:
        """``a + b``, of float32 or of integers."""
        number = a.type.element if isinstance(a.type, ir.VectorType) else a.type
        return (self.builder.add if isinstance(number, ir.IntType) else self.builder.fadd)(a, b)

    def negated(self, a: Value) -> Value:
        return self.builder.fneg(a)

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """``a * b + c``, rounded once."""
        name = f"llvm.fma.v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "llvm.fma.f32"
        return self.builder.call(self.declared(name, a.type, [a.type] * 3), [a, b, c])

    def larger(self, a: Value, b: Value) -> Value:
        """The larger of two numbers, or of the numbers of two vectors; of a NaN and a number, the second one."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def exp(self, x: Value) -> Value:
        """e to the power of a vector's numbers, within 2e-7 of it; no less than 2 ** -126, no more than 2 ** 127."""
        power = self.multiplied(x, ir.Constant(x.type, [math.log2(math.e)] * x.type.count))
        most = ir.Constant(x.type, [-127.0] * x.type.count)
        power = self.negated(self.larger(most, self.negated(power)))
        return self.builder.select(self.builder.fcmp_unordered("uno", x, x), x, self.power_of_two(power))

    def power_of_two(self, x: Value) -> Value:
        """2 to the power of a vector's numbers, none of which is above 127, within 2e-7 of it; no less than 2 ** -126.

        2 ** (n + f), n being the nearest integer: the exponent's bits, and Taylor's series of 2 ** f for |f| <= 1/2.
        """
        kind, whole = x.type, _with_numbers(x.type, WORD)
        of = lambda value: ir.Constant(kind, [value] * kind.count)  # noqa: E731
        x = self.larger(of(-126.0), x)
        # in this sum no bit is left for fractions, and the last ones are the integer's
        magic = of(1.5 * 2**23)
        shifted = self.summed(x, magic)
        fraction = self.builder.fsub(x, self.builder.fsub(shifted, magic))
        series = [math.log(2) ** i / math.factorial(i) for i in range(7)]
        result = of(series[-1])
        for factor in reversed(series[:-1]):
            result = self.multiply_add(result, fraction, of(factor))
        exponent = self.shifted_up(self.builder.bitcast(shifted, whole), 23)
        return self.builder.bitcast(self.builder.add(self.builder.bitcast(result, whole), exponent), kind)

    def largest_of(self, vector: Value) -> Value:
        """The largest of a vector's numbers."""
        while (half := vector.type.count // 2) >= 1:
            vector = self.larger(self.part(vector, 0, half), self.part(vector, half, half))
        return self.builder.extract_element(vector, ir.Constant(WORD, 0))

    def sum_of(self, vector: Value) -> Value:
        """The sum of a vector's numbers: the right half to the left one, until one is left."""
        while (half := vector.type.count // 2) >= 1:
            vector = self.summed(self.part(vector, 0, half), self.part(vector, half, half))
        return self.builder.extract_element(vector, ir.Constant(WORD, 0))

    def sums_of(self, vectors: Sequence[Value]) -> Value:
        """A vector of the `sum_of` each of some vectors, whose number is a power of two."""
        pieces: list[Value] = list(vectors)
        width = vectors[0].type.count
        while width > 1:
            half, length = width // 2, pieces[0].type.count
            together = 2 if len(pieces) > 1 else 1
            firsts = range(0, together * length, width)
            places = [[first + side * half + i for first in firsts for i in range(half)] for side in (0, 1)]
            left, right = (ir.Constant(ir.VectorType(WORD, len(each)), each) for each in places)
            pieces = [
                self.summed(
                    *(self.builder.shuffle_vector(pieces[i], pieces[i + together - 1], at) for at in (left, right))
                )
                for i in range(0, len(pieces), together)
            ]
            width = half
        while len(pieces) > 1:
            count = 2 * pieces[0].type.count
            places = ir.Constant(ir.VectorType(WORD, count), list(range(count)))
            pairs = zip(pieces[::2], pieces[1::2], strict=True)
            pieces = [self.builder.shuffle_vector(a, b, places) for a, b in pairs]
        return pieces[0]

    def declared(self, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> ir.Function:
        """A function of LLVM's own."""
        known = self._module.globals.get(name)
        return known or ir.Function(self._module, ir.FunctionType(result, arguments), name)

    # ---- loops

    @contextlib.contextmanager
    def loop(self, start: Value, stop: Value, step: Value | int, carried: Sequence[Value] = ()) -> Iterator[Loop]:
        """``for i in range(start, stop, step)``, with values that go from one round to the next."""
        before, builder = self.builder.block, self.builder
        head, body, end = (self.function.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        i = builder.phi(LONG)
        i.add_incoming(start, before)
        values = [builder.phi(value.type) for value in carried]
        for phi, value in zip(values, carried, strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", i, stop), body, end)
        builder.position_at_end(body)
        loop = Loop(i, values)
        yield loop
        last = builder.block
        i.add_incoming(self.add(i, step), last)
        for phi, value in zip(values, loop.next, strict=True):
            phi.add_incoming(value, last)
        builder.branch(head)
        builder.position_at_end(end)


class Loop:
    """A loop that is being written: `next` is what the body leaves for the next round; behind the loop, `values` are
    the last ones."""

    def __init__(self, index: Value, values: list[Value]):
        self.index, self.values, self.next = index, values, list(values)


class _BFloat16(ir.Type):
    """LLVM's ``bfloat``, which llvmlite has no type for."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


def _with_numbers(kind: ir.Type, number: ir.Type) -> ir.Type:
    return ir.VectorType(number, kind.count) if isinstance(kind, ir.VectorType) else number
