// Simple markdown -> DOM nodes. Text only ever becomes text nodes: nothing that a model wrote is parsed as HTML.
import { say } from "./words.js";

const URL_HERE = /https?:\/\/[^\s<>()，。；）]*[^\s<>()，。；）.,;:!?'"*]/y;
const LINK_HERE = /\[([^\[\]\n]{1,500})\]\((https?:\/\/[^\s()]{1,2000})\)/y;
const SPECIAL = /[`*[]|https?:\/\//g;

function element(tag, children = [], name = "") {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...children);
  return node;
}

function link(href, text) {
  const node = element("a", [text]);
  node.href = href;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}

function at(pattern, text, index) {
  pattern.lastIndex = index;
  return pattern.exec(text);
}

/** Where a run of exactly `mark` stands from `from` on, with no blank before it; -1 where none does. */
function closing(text, mark, from) {
  for (let i = text.indexOf(mark, from); i >= 0; ) {
    let end = i + mark.length;
    while (text[end] === mark[0]) end += 1;
    if (end - i === mark.length && i > from && (mark[0] === "`" || text[i - 1] !== " ")) return i;
    i = text.indexOf(mark, end);
  }
  return -1;
}

/** Code, strong, emphasis, links. A mark that once found no end is not looked for again, so that a model that
    repeats one for ever costs no more than its length. */
function inline(text) {
  const out = [];
  const hopeless = new Set();
  let done = 0;
  const take = (from, to, node) => {
    if (from > done) out.push(text.slice(done, from));
    if (node) out.push(node);
    done = to;
    SPECIAL.lastIndex = to;
  };
  SPECIAL.lastIndex = 0;
  for (let found; (found = SPECIAL.exec(text)); ) {
    const i = found.index;
    if (found[0] === "[") {
      const here = at(LINK_HERE, text, i);
      if (here) take(i, i + here[0].length, link(here[2], here[1]));
    } else if (found[0].startsWith("http")) {
      const here = at(URL_HERE, text, i);
      if (here) take(i, i + here[0].length, link(here[0], here[0]));
    } else {
      let end = i;
      while (text[end] === found[0]) end += 1;
      const mark = text.slice(i, end);
      const code = found[0] === "`";
      const usable = code || (mark.length <= 2 && text[end] !== undefined && text[end] !== " ");
      const close = usable && !hopeless.has(mark) ? closing(text, mark, end) : -1;
      if (close < 0) {
        if (usable) hopeless.add(mark);
        SPECIAL.lastIndex = end;
        continue;
      }
      const inner = text.slice(end, close);
      const node = code
        ? element("code", [inner.replace(/^ (.+) $/, "$1")])
        : element(mark.length === 2 ? "strong" : "em", inlineInside(inner));
      take(i, close + mark.length, node);
    }
  }
  if (done < text.length) out.push(text.slice(done));
  return out;
}

function inlineInside(text) {
  const place = SPECIAL.lastIndex;
  const out = inline(text);
  SPECIAL.lastIndex = place;
  return out;
}

function lines(texts) {
  return texts.flatMap((text, i) => (i ? [document.createElement("br"), ...inline(text)] : inline(text)));
}

function codeBlock(language, text) {
  const copy = element("button", [say("copy")], "link copy-code");
  copy.type = "button";
  copy.setAttribute("aria-label", say("copyCode"));
  const head = element("div", [element("span", [language || say("code")]), copy], "code-head");
  const block = element("pre", [element("code", [text])]);
  block.tabIndex = 0;  // a wide block is scrolled with the keyboard
  return element("div", [head, block], "code");
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)\s*$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.+?)\s*#*$/;
const DEEPEST = 8;  // quotes in quotes, lists in lists: a model that repeats itself must not exhaust the stack
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;

function starts(line) {
  return !line.trim() || FENCE.test(line) || ITEM.test(line) || HEADING.test(line) || RULE.test(line) || /^ {0,3}>/.test(line);
}

/** Items at one depth; deeper ones become lists inside. Returns the list and the line behind it. */
function list(source, from, depth) {
  const [, indent, mark] = ITEM.exec(source[from]);
  const ordered = /\d/.test(mark);
  const node = element(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(mark, 10);
  let i = from;
  while (i < source.length) {
    const found = ITEM.exec(source[i]);
    if (found && found[1].length > indent.length + 1 && node.lastChild && depth < DEEPEST) {
      const [inner, next] = list(source, i, depth + 1);
      node.lastChild.append(inner);
      i = next;
    } else if (found && found[1].length >= indent.length && /\d/.test(found[2]) === ordered) {
      node.append(element("li", inline(found[3])));
      i += 1;
    } else if (!found && !starts(source[i]) && /^\s/.test(source[i]) && node.lastChild) {
      node.lastChild.append(" ", ...inline(source[i].trim()));
      i += 1;
    } else if (!source[i].trim() && ITEM.exec(source[i + 1] || "")?.[1].length >= indent.length) {
      i += 1;
    } else {
      break;
    }
  }
  return [node, i];
}

export function markdown(text, depth = 0) {
  const source = text.split("\n");
  const out = document.createDocumentFragment();
  for (let i = 0; i < source.length; ) {
    const line = source[i];
    let found;
    if (!line.trim()) {
      i += 1;
    } else if ((found = FENCE.exec(line))) {
      const closing = new RegExp(`^ {0,3}${found[1][0]}{${found[1].length},}\\s*$`);
      let end = i + 1;
      while (end < source.length && !closing.test(source[end])) end += 1;
      out.append(codeBlock(found[2], source.slice(i + 1, end).join("\n")));
      i = end + 1;
    } else if (RULE.test(line)) {
      out.append(element("hr"));
      i += 1;
    } else if ((found = HEADING.exec(line))) {
      out.append(element(`h${Math.min(found[1].length + 2, 6)}`, inline(found[2])));
      i += 1;
    } else if (depth < DEEPEST && /^ {0,3}>/.test(line)) {
      let end = i;
      while (end < source.length && /^ {0,3}>/.test(source[end])) end += 1;
      const inner = source.slice(i, end).map((text) => text.replace(/^ {0,3}> ?/, "")).join("\n");
      out.append(element("blockquote", [markdown(inner, depth + 1)]));
      i = end;
    } else if (ITEM.test(line)) {
      const [node, next] = list(source, i, depth);
      out.append(node);
      i = next;
    } else {
      let end = i + 1;
      while (end < source.length && !starts(source[end])) end += 1;
      out.append(element("p", lines(source.slice(i, end))));
      i = end;
    }
  }
  return out;
}
