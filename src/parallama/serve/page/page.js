// The chat page: what is said stays in this tab's session storage, and goes to this server alone.
const at = (id) => document.getElementById(id);
const SAVED = ["system", "temperature", "seed", "limit", "key"];
const store = sessionStorage;
let messages = JSON.parse(store.getItem("messages") ?? "[]");
let running = null;
let model = null;

function say(text, bad = false) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", bad);
}

function show(message) {
  const line = document.createElement("li");
  line.dataset.who = message.role === "user" ? "You" : "Model";
  line.setAttribute("aria-label", line.dataset.who);
  line.textContent = message.content;
  at("talk").append(line);
  at("talk").scrollTop = at("talk").scrollHeight;
  return line;
}

function keep() {
  store.setItem("messages", JSON.stringify(messages));
  for (const name of SAVED) store.setItem(name, at(name).value);
}

function askForKey() {
  return new Promise((done) => {
    const dialog = at("asked");
    dialog.addEventListener("close", () => {
      at("key").value = at("asked-key").value;
      at("asked-key").value = "";
      keep();
      done(Boolean(at("key").value));
    }, { once: true });
    if (!dialog.open) dialog.showModal();
  });
}

async function call(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers };
    if (at("key").value) headers.authorization = `Bearer ${at("key").value}`;
    const answer = await fetch(path, { ...options, headers });
    if (answer.status === 401 && (await askForKey())) continue;
    if (!answer.ok) {
      const body = await answer.json().catch(() => null);
      throw new Error(body?.error?.message ?? `the server answered ${answer.status}`);
    }
    return answer;
  }
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function body() {
  const system = at("system").value.trim();
  const asked = {
    model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const [id, field] of [["temperature", "temperature"], ["seed", "seed"], ["limit", "max_tokens"]]) {
    if (at(id).value !== "") asked[field] = Number(at(id).value);
  }
  return JSON.stringify(asked);
}

function busy(is) {
  at("send").disabled = is;
  at("stop").disabled = !is;
}

async function send() {
  const text = at("text").value;
  if (!text.trim() || running) return;
  messages.push({ role: "user", content: text });
  show(messages.at(-1));
  at("text").value = "";
  running = new AbortController();
  busy(true);
  say("waiting for the first token");
  const answer = { role: "assistant", content: "" };
  let line = null;
  let first = 0;
  let tokens = 0;
  try {
    const found = await call("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: body(),
      signal: running.signal,
    });
    let ended = false;
    for await (const event of events(found)) {
      if (event.error) throw new Error(event.error.message);
      ended ||= Boolean(event.choices[0]?.finish_reason);
      const new_text = event.choices[0]?.delta.content;
      if (event.usage) tokens = event.usage.completion_tokens;
      if (!new_text) continue;
      first ||= performance.now();
      line ??= show(answer);
      answer.content += new_text;
      line.textContent = answer.content;
      at("talk").scrollTop = at("talk").scrollHeight;
      say("answering");
    }
    if (!ended) throw new Error("the answer broke off");
    const seconds = (performance.now() - first) / 1000;
    const speed = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    say(`${tokens} tokens${speed}`);
  } catch (error) {
    if (error.name === "AbortError") say("stopped");
    else say(error instanceof TypeError ? "the server is gone" : error.message, true);
  } finally {
    if (answer.content) messages.push(answer);
    running = null;
    busy(false);
    keep();
    at("text").focus();
  }
}

async function greet() {
  try {
    const found = await (await call("v1/models")).json();
    model = found.data[0].id;
    at("model").textContent = `${model}, ${found.data[0].max_model_len} tokens`;
  } catch (error) {
    say(error instanceof TypeError ? "the server is gone" : error.message, true);
  }
}

async function drawMesh() {
  if (!at("mesh").open || at("tensors").children.length) return;
  try {
    const found = await (await call("mesh")).json();
    const picture = document.createElement("img");
    picture.alt = `${found.title}; the table below says the same`;
    picture.src = URL.createObjectURL(new Blob([found.svg], { type: "image/svg+xml" }));
    at("drawing").replaceChildren(picture);
    for (const tensor of found.tensors) {
      const row = at("tensors").insertRow();
      const axes = tensor.axes.map((axis) => axis ?? "-").join(", ");
      for (const text of [tensor.name, tensor.shape.join(" x "), axes]) {
        row.insertCell().textContent = text;
      }
    }
  } catch (error) {
    say(error.message, true);
  }
}

for (const name of SAVED) at(name).value = store.getItem(name) ?? at(name).value;
messages.forEach(show);
at("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  at("talk").replaceChildren();
  say("");
  keep();
  at("text").focus();
});
at("mesh").addEventListener("toggle", drawMesh);
addEventListener("pagehide", keep);
greet();
