"use strict";
const $ = (id) => document.getElementById(id);
const messages = [];
let running = null;

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `status ${response.status}`;
  }
}

// Whatever a model writes is shown as text: nothing of it is read as HTML.
function add(parent, kind, text = "") {
  const made = document.createElement("div");
  made.className = kind;
  made.textContent = text;
  parent.append(made);
  return made;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

async function answer() {
  const box = add($("talk"), "message assistant");
  const reasoning = add(box, "reasoning"), content = add(box, "content"), note = add(box, "note");
  const began = performance.now();
  let first = null, usage = null;
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({
        messages,
        stream: true,
        stream_options: { include_usage: true },
        temperature: Number($("temperature").value),
        max_completion_tokens: Number($("tokens").value),
      }),
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const delta = event.choices[0]?.delta ?? {};
      if (delta.content || delta.reasoning_content) first ??= performance.now();
      reasoning.append(delta.reasoning_content ?? "");
      content.append(delta.content ?? "");
      box.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    if (error.name !== "AbortError") add(box, "error", error.message);
  }
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  if (content.textContent) messages.push({ role: "assistant", content: content.textContent });
  if (usage && first) {
    const seconds = (performance.now() - first) / 1000;
    const rate = usage.completion_tokens > 1 ? ((usage.completion_tokens - 1) / seconds).toFixed(1) : "-";
    const cached = usage.prompt_tokens_details.cached_tokens;
    note.textContent = `${usage.completion_tokens} tokens, ${rate} per second, first after ` +
      `${(first - began).toFixed(0)} ms; ${cached} of ${usage.prompt_tokens} prompt tokens from the cache`;
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  messages.push({ role: "user", content: text });
  add($("talk"), "message user", text);
  answer();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  $("talk").replaceChildren();
});

let before = null;
async function watch() {
  try {
    const response = await fetch("stats", { headers: headers() });
    if (response.ok) {
      const stats = await response.json(), now = performance.now() / 1000;
      const percent = (share) => `${(share * 100).toFixed(1)} %`;
      if (before) {
        $("rate").textContent = ((stats.generation_tokens - before.tokens) / (now - before.time)).toFixed(1);
      }
      before = { tokens: stats.generation_tokens, time: now };
      $("load").textContent = `${stats.running}, ${stats.waiting}`;
      $("usage").textContent = percent(stats.kv_cache_usage);
      $("hits").textContent = percent(stats.prefix_cache_hit_rate);
      $("model").textContent = stats.model;
      $("plan").textContent = stats.memory_plan;
    }
  } catch {
    $("rate").textContent = "no server";
  }
  setTimeout(watch, 1000);
}
watch();
