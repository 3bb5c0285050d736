// The chat page: state, events, and the two answers to one question.
import { ApiError, chat, models } from "./api.js";
import { key, recall, remember, setKey, state } from "./store.js";
import { announce, atEnd, copy, drawTurn, notice, now, soon, toEnd } from "./view.js";
import { knows, say, speak, translate } from "./words.js";

const byId = (id) => document.getElementById(id);
const log = byId("log");
const turns = byId("turns");
const message = byId("message");
const settings = byId("settings");
const FIELDS = ["system", "temperature", "top_p", "max_tokens", "seed"];

let known = [];  // the server's models
let running = null;  // the AbortController of the answers under way
let composing = false;
let undo = null;
let eager = false;  // sent before the server had answered: goes out as soon as it has

const tuned = (name) => known.some((model) => model.id === name && model.parent);
const columnOf = (turn, answer) =>
  turns.querySelector(`[data-turn="${state.turns.indexOf(turn)}"] [data-answer="${turn.answers.indexOf(answer)}"]`);

function inWords(error) {
  if (error instanceof ApiError && knows(error.code)) return say(error.code);
  return error.message || String(error);
}

// What is shown

function draw() {
  translate(document);
  byId("language").textContent = say("other");
  byId("language").setAttribute("aria-label", say("otherLabel"));
  byId("language").lang = state.language === "zh" ? "en" : "zh-CN";
  document.documentElement.dataset.theme = state.theme;
  byId("theme").value = state.theme;
  for (const name of FIELDS) byId(name).value = state[name];
  drawModels();
  turns.replaceChildren(...state.turns.map((turn, i) => drawTurn(turn, i, tuned)));
  drawEmpty();
  toEnd();
}

function drawEmpty() {
  byId("empty").hidden = state.turns.length > 0 || !known.length;
  byId("new").disabled = !state.turns.length;
  const two = { first: state.first, second: state.second };
  byId("greeting").textContent = state.second ? say("greetingTwo") : say("greeting", { model: state.first });
  byId("hint").textContent = state.second ? say("hintTwo", two) : say("hint");
}

function drawModels() {
  const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
  byId("first").replaceChildren(...known.map((model) => option(model.id, model.id)));
  byId("first").value = state.first;
  const others = known.filter((model) => model.id !== state.first);
  byId("second").replaceChildren(option("", say(state.second ? "none" : "compare")), ...others.map((model) => option(model.id, model.id)));
  byId("second").value = state.second || "";
  byId("beside").hidden = known.length < 2;
  byId("versus").hidden = !state.second;
}

function choose() {
  const names = known.map((model) => model.id);
  const adapters = known.filter((model) => model.parent).map((model) => model.id);
  if (!names.includes(state.first)) state.first = adapters[0] || names[0];
  if (state.second === null && adapters.length && matchMedia("(min-width: 50rem)").matches) {
    state.second = known.find((model) => !model.parent).id;  // what training changed is seen at once
  }
  if (state.second === state.first || !names.includes(state.second)) state.second = state.second === null ? null : "";
}

function busy(on) {
  byId("send").hidden = on;
  byId("stop").hidden = !on;
}

// Asking

/** The conversation as `model` sees it: its own answers, another's where it gave none. */
function messagesFor(model, before) {
  const out = state.system.trim() ? [{ role: "system", content: state.system }] : [];
  for (const turn of state.turns.slice(0, before)) {
    const answer = turn.answers.find((a) => a.model === model && a.text) || turn.answers.find((a) => a.text);
    if (!answer) continue;
    out.push({ role: "user", content: turn.question }, { role: "assistant", content: answer.text });
  }
  out.push({ role: "user", content: state.turns[before].question });
  return out;
}

function request(model, before) {
  const asked = { model, messages: messagesFor(model, before) };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (state[name] !== "") asked[name] = Number(state[name]);
  }
  return asked;
}

async function answerOne(turn, answer, signal) {
  const start = performance.now();
  const column = columnOf(turn, answer);
  try {
    for await (const part of chat(request(answer.model, state.turns.indexOf(turn)), signal)) {
      if (part.text) answer.text += part.text;
      if (part.tokens !== undefined) answer.tokens = part.tokens;
      if (part.finish) answer.ending = part.finish;
      else soon(column, answer);
    }
    answer.finish = answer.ending;
  } catch (error) {
    if (error.name === "AbortError") answer.finish = "stopped";
    else answer.error = inWords(error);
    if (error.code === "missing_api_key" || error.code === "invalid_api_key") askForKey();
  }
  answer.seconds = (performance.now() - start) / 1000;
  delete answer.ending;
  now(column, answer);
  announce(answer.error || say("announce", { model: answer.model, text: answer.text }));
  remember();
}

async function run(turn, answers) {
  running = new AbortController();
  busy(true);
  notice("");
  announce(say("answering", { model: answers.map((answer) => answer.model).join(" + ") }));
  await Promise.all(answers.map((answer) => answerOne(turn, answer, running.signal)));
  running = null;
  busy(false);
}

function fresh(model) {
  return { model, text: "", finish: "", error: "", tokens: 0, seconds: 0 };
}

function send() {
  const question = message.value.trim();
  if (!question || running) return;
  eager = !known.length;
  if (eager) return;
  const names = [state.first, state.second].filter(Boolean);
  const turn = { question, answers: names.map(fresh) };
  state.turns.push(turn);
  turns.append(drawTurn(turn, state.turns.length - 1, tuned));
  message.value = state.draft = "";
  grow();
  drawEmpty();
  hideToast();
  toEnd();
  remember();
  run(turn, turn.answers);
}

/** Answers once more. A later turn would no longer follow from it, so those go. */
function again(turn, i) {
  if (running) return;
  state.turns.length = state.turns.indexOf(turn) + 1;
  turn.answers[i] = fresh(turn.answers[i].model);
  draw();
  run(turn, [turn.answers[i]]);
}

function stop() {
  running?.abort();
  message.focus();
}

// A new conversation, and back

function clear() {
  if (!state.turns.length) return;
  running?.abort();
  undo = state.turns;
  state.turns = [];
  draw();
  remember();
  byId("toast").hidden = false;
  byId("toast").querySelector("span").textContent = say("cleared");
  message.focus();
  clearTimeout(clear.timer);
  clear.timer = setTimeout(hideToast, 8000);
}

function hideToast() {
  byId("toast").hidden = true;
  undo = null;
}

// The key

function askForKey() {
  byId("key-field").hidden = false;
  byId("key").value = key();
  if (!settings.open) settings.showModal();
  byId("key").focus();
}

/** Until the server answers: it may be loading, or want a key. */
async function connect() {
  try {
    known = await models();
    notice("");
    choose();
    draw();
    if (eager) send();
  } catch (error) {
    notice(inWords(error));
    if (error.code === "missing_api_key" || error.code === "invalid_api_key") askForKey();
    else setTimeout(connect, 2000);
  }
}

function grow() {
  message.style.height = "auto";
  message.style.height = `${Math.min(message.scrollHeight, innerHeight * 0.4)}px`;
}

// Events

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("compositionstart", () => { composing = true; });
message.addEventListener("compositionend", () => { setTimeout(() => { composing = false; }); });
message.addEventListener("keydown", (event) => {
  // An Enter that picks a candidate in an input method must not send; Safari says so by the key code alone.
  if (event.isComposing || composing || event.keyCode === 229) return;
  if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.altKey && !event.metaKey) {
    event.preventDefault();
    send();
  }
});
message.addEventListener("input", () => {
  state.draft = message.value;
  grow();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !settings.open && !event.isComposing && !composing) stop();
});
byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", clear);
byId("undo").addEventListener("click", () => {
  if (undo) state.turns = undo;
  hideToast();
  draw();
  remember();
  message.focus();
});
byId("first").addEventListener("change", (event) => {
  state.first = event.target.value;
  if (state.second === state.first) state.second = "";
  drawModels();
  drawEmpty();
  remember();
});
byId("second").addEventListener("change", (event) => {
  state.second = event.target.value;
  drawModels();
  drawEmpty();
  remember();
});
byId("language").addEventListener("click", () => {
  state.language = state.language === "zh" ? "en" : "zh";
  speak(state.language);
  remember();
  draw();
});
byId("open").addEventListener("click", () => settings.showModal());
settings.addEventListener("click", (event) => {
  if (event.target === settings) settings.close();  // beside it
});
for (const name of FIELDS) {
  byId(name).addEventListener("input", (event) => {
    if (event.target.validity.valid) state[name] = event.target.value;
  });
}
byId("theme").addEventListener("change", (event) => {
  state.theme = event.target.value;
  document.documentElement.dataset.theme = state.theme;
});
settings.addEventListener("close", () => {
  for (const name of FIELDS) byId(name).value = state[name];  // what was no number is not kept
  remember();
  if (!byId("key-field").hidden && byId("key").value !== key()) {
    setKey(byId("key").value.trim());
    if (!known.length) connect();
  }
  message.focus();
});
turns.addEventListener("click", (event) => {
  const node = event.target.closest("button");
  if (!node) return;
  if (node.classList.contains("copy-code")) {
    copy(node.closest(".code").querySelector("pre").textContent, node);
    return;
  }
  const turn = state.turns[node.closest("[data-turn]").dataset.turn];
  const i = Number(node.closest("[data-answer]").dataset.answer);
  if (node.dataset.action === "copy") copy(turn.answers[i].text, node);
  if (node.dataset.action === "again") again(turn, i);
});
log.addEventListener("scroll", () => { byId("latest").hidden = atEnd(); });
byId("latest").addEventListener("click", toEnd);
addEventListener("pagehide", remember);

recall();
if (!state.language) state.language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
speak(state.language);
message.value = state.draft;
draw();
grow();
if (matchMedia("(hover: hover)").matches) message.focus();  // on a phone it would raise the keyboard
connect();
