// Turns on the screen. Each answer's text is drawn anew at most once a frame while it grows.
import { markdown } from "./markdown.js";
import { say } from "./words.js";

const byId = (id) => document.getElementById(id);
const log = byId("log");

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

function button(word, action) {
  const node = make("button", "link", say(word));
  node.type = "button";
  node.dataset.action = action;
  return node;
}

/** One turn: the question and a column for each answer. `tuned` says whether a model is an adapter. */
export function drawTurn(turn, number, tuned) {
  const node = make("article", "turn");
  node.dataset.turn = number;
  const question = make("div", "question");
  question.append(make("h2", "unseen", say("you")), make("p", "", turn.question));
  const answers = make("div", "answers");
  answers.dataset.count = turn.answers.length;
  for (const [i, answer] of turn.answers.entries()) {
    const column = make("div", "answer");
    column.dataset.answer = i;
    column.setAttribute("role", "group");
    column.setAttribute("aria-label", say("answerOf", { model: answer.model }));
    const head = make("h3");
    head.append(make("span", tuned(answer.model) ? "dot tuned" : "dot"), make("span", "name", answer.model));
    if (turn.answers.length > 1) head.append(make("span", "kind", say(tuned(answer.model) ? "tuned" : "base")));
    column.append(head, make("div", "text"), make("p", "fault"), make("div", "foot"));
    answers.append(column);
  }
  node.append(question, answers);
  turn.answers.forEach((answer, i) => drawAnswer(node.querySelectorAll(".answer")[i], answer));
  return node;
}

export function drawAnswer(column, answer) {
  const running = !answer.finish && !answer.error;
  column.setAttribute("aria-busy", String(running));
  column.classList.toggle("running", running);
  const text = column.querySelector(".text");
  text.replaceChildren(markdown(answer.text));
  if (!running && !answer.text && !answer.error) text.replaceChildren(make("p", "none", say("empty")));
  const fault = column.querySelector(".fault");
  fault.textContent = answer.error || "";
  fault.hidden = !answer.error;
  const foot = column.querySelector(".foot");
  foot.replaceChildren();
  if (running) {
    if (!answer.text) {
      const dots = make("span", "dots");
      dots.setAttribute("role", "img");
      dots.setAttribute("aria-label", say("thinking"));
      dots.append(make("i"), make("i"), make("i"));
      foot.append(dots);
    }
    return;
  }
  const facts = [];
  if (answer.tokens) facts.push(say("tokens", { n: answer.tokens }));
  if (answer.seconds) facts.push(say("seconds", { s: answer.seconds.toFixed(1) }));
  if (answer.finish === "stopped") facts.push(say("stopped"));
  if (answer.finish === "length") facts.push(say("cut"));
  if (answer.text) foot.append(button("copy", "copy"));
  foot.append(button("again", "again"));
  if (facts.length) foot.append(make("span", "facts", facts.join(" · ")));
}

const waiting = new Map();

/** Draws an answer at the next frame, and keeps the end in sight if it was. */
export function soon(column, answer) {
  if (!waiting.size) {
    requestAnimationFrame(() => {
      const follow = atEnd();
      for (const [where, what] of waiting) drawAnswer(where, what);
      waiting.clear();
      if (follow) toEnd();
    });
  }
  waiting.set(column, answer);
}

export function now(column, answer) {
  waiting.delete(column);
  const follow = atEnd();
  drawAnswer(column, answer);
  if (follow) toEnd();
}

export function atEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

export function toEnd() {
  log.scrollTop = log.scrollHeight;
}

/** Read out by a screen reader once it has finished what it is saying. */
export function announce(text) {
  byId("said").textContent = text;
}

export function notice(text) {
  const node = byId("notice");
  node.textContent = text;
  node.hidden = !text;
}

export async function copy(text, node) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // not a secure address (a plain http one of another machine): the old way
    const area = make("textarea", "unseen");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    node.focus();
  }
  const before = node.textContent;
  node.textContent = say("copied");
  announce(say("copied"));
  setTimeout(() => { node.textContent = before; }, 1500);
}
