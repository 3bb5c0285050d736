// What the page remembers. The conversation and the settings outlive the tab; the key does not.
const NAME = "minitune.chat";
const KEY = "minitune.key";

export const state = {
  language: "", theme: "auto", first: "", second: null, system: "",
  temperature: "", top_p: "", max_tokens: "512", seed: "", draft: "",
  turns: [],  // {question, answers: [{model, text, finish, error, tokens, seconds}]}
};

export function remember() {
  try {
    localStorage.setItem(NAME, JSON.stringify(state));
  } catch { /* a private window, or full: the page works without */ }
}

export function recall() {
  try {
    const kept = JSON.parse(localStorage.getItem(NAME) || "{}");
    for (const name of Object.keys(state)) {
      if (typeof kept[name] === typeof state[name] || name === "second") state[name] = kept[name] ?? state[name];
    }
    if (!Array.isArray(state.turns)) state.turns = [];
    state.turns = state.turns.filter((turn) => typeof turn.question === "string" && Array.isArray(turn.answers));
    for (const turn of state.turns) {
      for (const answer of turn.answers) if (!answer.finish && !answer.error) answer.finish = "stopped";
    }
  } catch { /* as if new */ }
}

export function key() {
  try {
    return sessionStorage.getItem(KEY) || "";
  } catch {
    return "";
  }
}

export function setKey(value) {
  try {
    sessionStorage.setItem(KEY, value);
  } catch { /* asked for again after a reload */ }
}
