"""One launch of a kernel, shared out on XLA's own threads, in LLVM code.

The numbers along the last dimension of the first result are handed out in items. Whoever works on a launch, its caller
before all, claims the next item, a part of what is left, until there is none: items become smaller, so that nobody
waits long for the last one, and who comes late, or is slow, takes fewer. Helpers are put on XLA's pool. They may run
late, or in the caller: one that finds nothing left touches nothing but the launch's own record, which the last of all
who know it frees. The caller waits for items that others have begun, and never for a helper that has not. So launches
may run at once, from any threads, and beside anything else that the pool does. Without numbers there is no item, and
no record.

A kernel is a function ``void(ptr table, i64 first, i64 behind)``. The table has two words an operand, arguments before
results: the address of its numbers, and that of its dimensions (i64). The other two are an item's first number and the
one behind its last.
"""

from __future__ import annotations

#: numbers of an item come in multiples of it
UNIT = 4
#: an item is a thread's share of what is left, divided by the first one, and no less than its share of the whole,
#: divided by the second one
PARTS = 2, 8
#: where some numbers are much more work than others, which may be neighbours
UNEVEN_PARTS = 8, 32

# words of a launch's record
_NEXT, _DONE, _HOLDERS, _PARTS, _LEAST, _SIZE, _KERNEL, _TABLE = range(0, 64, 8)

LLVM = f"""
declare ptr @malloc(i64)
declare void @free(ptr)
declare i32 @sched_yield()

define internal void @take_items(ptr %launch) {{
  %parts = call i64 @load_at(ptr %launch, i64 {_PARTS})
  %least = call i64 @load_at(ptr %launch, i64 {_LEAST})
  %size = call i64 @load_at(ptr %launch, i64 {_SIZE})
  %kernel = call ptr @pointer_at(ptr %launch, i64 {_KERNEL})
  %table = getelementptr i8, ptr %launch, i64 {_TABLE}
  %done = getelementptr i8, ptr %launch, i64 {_DONE}
  br label %look
look:
  %seen = load atomic i64, ptr %launch monotonic, align 8
  br label %claim
claim:
  %first = phi i64 [ %seen, %look ], [ %other, %take ]
  %left = sub i64 %size, %first
  %any = icmp sgt i64 %left, 0
  br i1 %any, label %take, label %end
take:
  %part = udiv i64 %left, %parts
  %units = udiv i64 %part, {UNIT}
  %whole = mul i64 %units, {UNIT}
  %small = icmp slt i64 %whole, %least
  %count = select i1 %small, i64 %least, i64 %whole
  %beyond = add i64 %first, %count
  %fits = icmp slt i64 %beyond, %size
  %last = select i1 %fits, i64 %beyond, i64 %size
  %pair = cmpxchg ptr %launch, i64 %first, i64 %last monotonic monotonic
  %other = extractvalue {{ i64, i1 }} %pair, 0
  %taken = extractvalue {{ i64, i1 }} %pair, 1
  br i1 %taken, label %work, label %claim
work:
  call void %kernel(ptr %table, i64 %first, i64 %last)
  %numbers = sub i64 %last, %first
  atomicrmw add ptr %done, i64 %numbers release
  br label %look
end:
  ret void
}}

define internal void @let_go(ptr %launch) {{
  %holders = getelementptr i8, ptr %launch, i64 {_HOLDERS}
  %before = atomicrmw sub ptr %holders, i64 1 acq_rel
  %was_last = icmp eq i64 %before, 1
  br i1 %was_last, label %drop, label %end
drop:
  call void @free(ptr %launch)
  br label %end
end:
  ret void
}}

define internal void @help(ptr %launch) {{
  call void @take_items(ptr %launch)
  call void @let_go(ptr %launch)
  ret void
}}

; Runs a kernel for the call of a frame, in items of such parts.
define internal i64 @launch(ptr %frame, ptr %kernel, i64 %part.left, i64 %part.least) {{
  %metadata = call i1 @answers_metadata(ptr %frame)
  br i1 %metadata, label %return, label %prepare
prepare:
  %arguments = call i64 @load_at(ptr %frame, i64 56)
  %result = call ptr @operand(ptr %frame, i64 %arguments)
  %size = call i64 @last_dim(ptr %result)
  %any = icmp sgt i64 %size, 0
  br i1 %any, label %record, label %return
record:
  %operands = call i64 @num_operands(ptr %frame)
  %table.bytes = mul i64 %operands, 16
  %bytes = add i64 %table.bytes, {_TABLE}
  %launch = call ptr @malloc(i64 %bytes)
  %table = getelementptr i8, ptr %launch, i64 {_TABLE}
  br label %fill
fill:
  %i = phi i64 [ 0, %record ], [ %i.next, %fill ]
  %buffer = call ptr @operand(ptr %frame, i64 %i)
  %data = call i64 @buffer_data(ptr %buffer)
  %dims = call i64 @buffer_dims(ptr %buffer)
  %entry = mul i64 %i, 16
  %entry.dims = add i64 %entry, 8
  call void @store_at(ptr %table, i64 %entry, i64 %data)
  call void @store_at(ptr %table, i64 %entry.dims, i64 %dims)
  %i.next = add i64 %i, 1
  %more = icmp slt i64 %i.next, %operands
  br i1 %more, label %fill, label %divide
divide:
  %threads = call i64 @num_threads(ptr %frame)
  %parts = mul i64 %threads, %part.left
  %finest.units = mul i64 %threads, %part.least
  %finest = mul i64 %finest.units, {UNIT}
  %size.up = add i64 %size, %finest
  %size.less = sub i64 %size.up, 1
  %units = udiv i64 %size.less, %finest
  %some = icmp sgt i64 %units, 1
  %units.least = select i1 %some, i64 %units, i64 1
  %least = mul i64 %units.least, {UNIT}
  %with.rest = add i64 %size, %least
  %up = sub i64 %with.rest, 1
  %items = udiv i64 %up, %least
  %kernel.address = ptrtoint ptr %kernel to i64
  call void @store_at(ptr %launch, i64 {_NEXT}, i64 0)
  call void @store_at(ptr %launch, i64 {_DONE}, i64 0)
  call void @store_at(ptr %launch, i64 {_PARTS}, i64 %parts)
  call void @store_at(ptr %launch, i64 {_LEAST}, i64 %least)
  call void @store_at(ptr %launch, i64 {_SIZE}, i64 %size)
  call void @store_at(ptr %launch, i64 {_KERNEL}, i64 %kernel.address)
  %others = sub i64 %threads, 1
  %useful = sub i64 %items, 1
  %fewer = icmp slt i64 %useful, %others
  %helpers = select i1 %fewer, i64 %useful, i64 %others
  %holders = add i64 %helpers, 1
  call void @store_at(ptr %launch, i64 {_HOLDERS}, i64 %holders)
  br label %ask
ask:
  %asked = phi i64 [ 0, %divide ], [ %asked.next, %asked.end ]
  %ask.more = icmp slt i64 %asked, %helpers
  br i1 %ask.more, label %ask.one, label %own
ask.one:
  %taken = call i1 @schedule(ptr %frame, ptr @help, ptr %launch)
  br i1 %taken, label %asked.end, label %refused
refused:
  call void @let_go(ptr %launch)
  br label %asked.end
asked.end:
  %asked.next = add i64 %asked, 1
  br label %ask
own:
  call void @take_items(ptr %launch)
  br label %wait
wait:
  %rounds = phi i64 [ 0, %own ], [ %rounds.next, %wait.again ]
  %done.at = getelementptr i8, ptr %launch, i64 {_DONE}
  %done = load atomic i64, ptr %done.at acquire, align 8
  %all = icmp sge i64 %done, %size
  br i1 %all, label %finish, label %patient
patient:
  %rounds.next = add i64 %rounds, 1
  %long = icmp sgt i64 %rounds, 4096
  br i1 %long, label %yield, label %wait.again
yield:
  call i32 @sched_yield()
  br label %wait.again
wait.again:
  br label %wait
finish:
  call void @let_go(ptr %launch)
  br label %return
return:
  ret i64 0
}}
"""


def handler(parts: tuple[int, int]) -> str:
    """A function for XLA to call, `handler`, that runs the function `kernel` in items of such parts (`PARTS`)."""
    return f"""
declare void @kernel(ptr, i64, i64)
define i64 @handler(ptr %frame) {{
  %error = call i64 @launch(ptr %frame, ptr @kernel, i64 {parts[0]}, i64 {parts[1]})
  ret i64 %error
}}
"""
