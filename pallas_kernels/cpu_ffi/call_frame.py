"""What XLA hands a custom call: the call frame of its typed FFI (``xla/ffi/api/c_api.h``), read by LLVM code.

The functions here are the only ones that know its layout. A handler is called with a pointer to the frame; when XLA
registers it, the frame asks for metadata instead, and the handler notes which versions and sizes it has seen (`@seen`),
so that `why_not` can refuse a layout that is not this one before anything is computed.
"""

from __future__ import annotations

#: of the FFI's API; a larger minor version only appends fields
API_MAJOR, LEAST_API_MINOR = 0, 1
#: bytes of the structures, up to the last field that is read here
FRAME_BYTES, API_BYTES = 120, 152
#: what `@seen` holds
SEEN = ("frame bytes", "API bytes", "API major", "API minor")

LLVM = f"""
@seen = global [{len(SEEN)} x i64] zeroinitializer

; ---- small readers
define internal i64 @load_at(ptr %base, i64 %offset) alwaysinline {{
  %place = getelementptr i8, ptr %base, i64 %offset
  %value = load i64, ptr %place
  ret i64 %value
}}
define internal ptr @pointer_at(ptr %base, i64 %offset) alwaysinline {{
  %place = getelementptr i8, ptr %base, i64 %offset
  %value = load ptr, ptr %place
  ret ptr %value
}}
define internal void @store_at(ptr %base, i64 %offset, i64 %value) alwaysinline {{
  %place = getelementptr i8, ptr %base, i64 %offset
  store i64 %value, ptr %place
  ret void
}}

; Whether the frame asks for metadata, which it then gets: API version 0.1, no traits.
define internal i1 @answers_metadata(ptr %frame) {{
  %extension = call ptr @pointer_at(ptr %frame, i64 8)
  %none = icmp eq ptr %extension, null
  br i1 %none, label %no, label %look
look:
  %kind.at = getelementptr i8, ptr %extension, i64 8
  %kind = load i32, ptr %kind.at
  %wanted = icmp eq i32 %kind, 1
  br i1 %wanted, label %yes, label %no
yes:
  %metadata = call ptr @pointer_at(ptr %extension, i64 24)
  %major.at = getelementptr i8, ptr %metadata, i64 24
  store i32 {API_MAJOR}, ptr %major.at
  %minor.at = getelementptr i8, ptr %metadata, i64 28
  store i32 {LEAST_API_MINOR}, ptr %minor.at
  %traits.at = getelementptr i8, ptr %metadata, i64 32
  store i32 0, ptr %traits.at
  %frame.bytes = call i64 @load_at(ptr %frame, i64 0)
  call void @store_at(ptr @seen, i64 0, i64 %frame.bytes)
  %api = call ptr @pointer_at(ptr %frame, i64 16)
  %there = icmp ne ptr %api, null
  br i1 %there, label %note, label %done
note:
  %api.bytes = call i64 @load_at(ptr %api, i64 0)
  call void @store_at(ptr @seen, i64 8, i64 %api.bytes)
  %version = call i64 @load_at(ptr %api, i64 32)
  %major = and i64 %version, 4294967295
  call void @store_at(ptr @seen, i64 16, i64 %major)
  %minor = lshr i64 %version, 32
  call void @store_at(ptr @seen, i64 24, i64 %minor)
  br label %done
done:
  ret i1 true
no:
  ret i1 false
}}

; How many arguments and results the call has.
define internal i64 @num_operands(ptr %frame) {{
  %arguments = call i64 @load_at(ptr %frame, i64 56)
  %results = call i64 @load_at(ptr %frame, i64 96)
  %both = add i64 %arguments, %results
  ret i64 %both
}}

; A buffer of the call: the arguments, then the results.
define internal ptr @operand(ptr %frame, i64 %i) {{
  %arguments = call i64 @load_at(ptr %frame, i64 56)
  %is_argument = icmp slt i64 %i, %arguments
  %behind = sub i64 %i, %arguments
  %index = select i1 %is_argument, i64 %i, i64 %behind
  %list.offset = select i1 %is_argument, i64 72, i64 112
  %list = call ptr @pointer_at(ptr %frame, i64 %list.offset)
  %place = getelementptr ptr, ptr %list, i64 %index
  %buffer = load ptr, ptr %place
  ret ptr %buffer
}}
define internal i64 @buffer_data(ptr %buffer) {{
  %data = call i64 @load_at(ptr %buffer, i64 24)
  ret i64 %data
}}
define internal i64 @buffer_dims(ptr %buffer) {{
  %dims = call i64 @load_at(ptr %buffer, i64 40)
  ret i64 %dims
}}
define internal i64 @last_dim(ptr %buffer) {{
  %rank = call i64 @load_at(ptr %buffer, i64 32)
  %last = sub i64 %rank, 1
  %dims = call ptr @pointer_at(ptr %buffer, i64 40)
  %place = getelementptr i64, ptr %dims, i64 %last
  %size = load i64, ptr %place
  ret i64 %size
}}

; Threads of XLA's pool; 1 where it does not say.
define internal i64 @num_threads(ptr %frame) {{
  %count = alloca i64
  store i64 1, ptr %count
  %call = alloca [4 x i64]
  %count.address = ptrtoint ptr %count to i64
  %context = call i64 @load_at(ptr %frame, i64 24)
  call void @store_at(ptr %call, i64 0, i64 32)
  call void @store_at(ptr %call, i64 8, i64 0)
  call void @store_at(ptr %call, i64 16, i64 %context)
  call void @store_at(ptr %call, i64 24, i64 %count.address)
  %api = call ptr @pointer_at(ptr %frame, i64 16)
  %function = call ptr @pointer_at(ptr %api, i64 144)
  %error = call ptr %function(ptr %call)
  call void @forget_error(ptr %api, ptr %error)
  %threads = load i64, ptr %count
  %some = icmp sgt i64 %threads, 1
  %result = select i1 %some, i64 %threads, i64 1
  ret i64 %result
}}

; Puts task(data) on XLA's pool; whether that took it.
define internal i1 @schedule(ptr %frame, ptr %task, ptr %data) {{
  %call = alloca [5 x i64]
  %context = call i64 @load_at(ptr %frame, i64 24)
  %task.address = ptrtoint ptr %task to i64
  %data.address = ptrtoint ptr %data to i64
  call void @store_at(ptr %call, i64 0, i64 40)
  call void @store_at(ptr %call, i64 8, i64 0)
  call void @store_at(ptr %call, i64 16, i64 %context)
  call void @store_at(ptr %call, i64 24, i64 %task.address)
  call void @store_at(ptr %call, i64 32, i64 %data.address)
  %api = call ptr @pointer_at(ptr %frame, i64 16)
  %function = call ptr @pointer_at(ptr %api, i64 136)
  %error = call ptr %function(ptr %call)
  call void @forget_error(ptr %api, ptr %error)
  %taken = icmp eq ptr %error, null
  ret i1 %taken
}}

define internal void @forget_error(ptr %api, ptr %error) {{
  %none = icmp eq ptr %error, null
  br i1 %none, label %end, label %destroy
destroy:
  %call = alloca [3 x i64]
  %address = ptrtoint ptr %error to i64
  call void @store_at(ptr %call, i64 0, i64 24)
  call void @store_at(ptr %call, i64 8, i64 0)
  call void @store_at(ptr %call, i64 16, i64 %address)
  %function = call ptr @pointer_at(ptr %api, i64 64)
  call void %function(ptr %call)
  br label %end
end:
  ret void
}}
"""


def why_not(seen: tuple[int, ...]) -> str | None:
    """Why frames of these versions and sizes, which `@seen` holds, cannot be read; None: they can."""
    frame, api, major, minor = seen
    if frame < FRAME_BYTES or api < API_BYTES:
        return f"XLA's call frame has {frame} and {api} bytes, fewer than the {FRAME_BYTES} and {API_BYTES} of API 0.1"
    if major != API_MAJOR or minor < LEAST_API_MINOR:
        return f"XLA's FFI has version {major}.{minor}, not {API_MAJOR}.{LEAST_API_MINOR} or a later {API_MAJOR}.x"
    return None
