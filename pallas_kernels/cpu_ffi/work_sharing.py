"""One launch of a kernel, shared out on XLA's own threads, in LLVM code.

The numbers along the last dimension of the first result are cut into items. Whoever works on a launch, its caller
before all, claims the next item by an atomic counter until there is none. Helpers are put on XLA's pool. They may run
late, or in the caller: one that finds nothing left touches nothing but the launch's own record, which the last of all
who know it frees. The caller waits for items that others have begun, and never for a helper that has not. So launches
may run at once, from any threads, and beside anything else that the pool does.

A kernel is a function ``void(ptr table, i64 first, i64 behind)``. The table has two words an operand, arguments before
results: the address of its numbers, and that of its dimensions (i64). The other two are an item's first number and the
one behind its last.
"""

from __future__ import annotations

#: numbers of an item come in multiples of it
UNIT = 4
#: items for each thread, so that one that comes late, or is slow, holds up little
ITEMS_PER_THREAD = 4

# words of a launch's record
_NEXT, _DONE, _HOLDERS, _ITEMS, _PER_ITEM, _SIZE, _KERNEL, _TABLE = range(0, 64, 8)

LLVM = f"""
declare ptr @malloc(i64)
declare void @free(ptr)
declare i32 @sched_yield()

define internal void @take_items(ptr %launch) {{
  %items = call i64 @load_at(ptr %launch, i64 {_ITEMS})
  %per = call i64 @load_at(ptr %launch, i64 {_PER_ITEM})
  %size = call i64 @load_at(ptr %launch, i64 {_SIZE})
  %kernel = call ptr @pointer_at(ptr %launch, i64 {_KERNEL})
  %table = getelementptr i8, ptr %launch, i64 {_TABLE}
  %done = getelementptr i8, ptr %launch, i64 {_DONE}
  br label %claim
claim:
  %i = atomicrmw add ptr %launch, i64 1 monotonic
  %any = icmp slt i64 %i, %items
  br i1 %any, label %work, label %end
work:
  %first = mul i64 %i, %per
  %behind = add i64 %first, %per
  %fits = icmp slt i64 %behind, %size
  %last = select i1 %fits, i64 %behind, i64 %size
  call void %kernel(ptr %table, i64 %first, i64 %last)
  atomicrmw add ptr %done, i64 1 release
  br label %claim
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

; Runs a kernel for the call of a frame.
define internal i64 @launch(ptr %frame, ptr %kernel) {{
  %metadata = call i1 @answers_metadata(ptr %frame)
  br i1 %metadata, label %return, label %prepare
prepare:
  %operands = call i64 @num_operands(ptr %frame)
  %table.bytes = mul i64 %operands, 16
  %bytes = add i64 %table.bytes, {_TABLE}
  %launch = call ptr @malloc(i64 %bytes)
  %table = getelementptr i8, ptr %launch, i64 {_TABLE}
  br label %fill
fill:
  %i = phi i64 [ 0, %prepare ], [ %i.next, %fill ]
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
  %arguments = call i64 @load_at(ptr %frame, i64 56)
  %result = call ptr @operand(ptr %frame, i64 %arguments)
  %size = call i64 @last_dim(ptr %result)
  %threads = call i64 @num_threads(ptr %frame)
  %wanted = mul i64 %threads, {ITEMS_PER_THREAD * UNIT}
  %size.up = add i64 %size, %wanted
  %size.less = sub i64 %size.up, 1
  %units = udiv i64 %size.less, %wanted
  %some = icmp sgt i64 %units, 1
  %units.least = select i1 %some, i64 %units, i64 1
  %per = mul i64 %units.least, {UNIT}
  %with.rest = add i64 %size, %per
  %up = sub i64 %with.rest, 1
  %items = udiv i64 %up, %per
  %kernel.address = ptrtoint ptr %kernel to i64
  call void @store_at(ptr %launch, i64 {_NEXT}, i64 0)
  call void @store_at(ptr %launch, i64 {_DONE}, i64 0)
  call void @store_at(ptr %launch, i64 {_ITEMS}, i64 %items)
  call void @store_at(ptr %launch, i64 {_PER_ITEM}, i64 %per)
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
  %all = icmp sge i64 %done, %items
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


#: a function for XLA to call, `handler`, that runs the function `kernel`
HANDLER = """
declare void @kernel(ptr, i64, i64)
define i64 @handler(ptr %frame) {
  %error = call i64 @launch(ptr %frame, ptr @kernel)
  ret i64 %error
}
"""
