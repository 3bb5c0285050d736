// Every word that the page says, in both languages. `{name}` is filled in.
export const WORDS = {
  en: {
    lang: "en", other: "中文", otherLabel: "换成中文",
    skip: "To the message box", models: "Models", first: "Model", second: "Second model, beside it",
    versus: "vs", none: "no comparison", compare: "compare …", new: "New conversation", settings: "Settings", conversation: "Conversation",
    latest: "To the end", message: "Your message", placeholder: "Say something", send: "Send", stop: "Stop",
    keys: "Enter sends, Shift+Enter begins a new line, Esc stops an answer.",
    close: "Close", done: "Done", undo: "Undo", cleared: "A new conversation.",
    key: "API key", keyNote: "This server asks for one. It is kept until this tab is closed.",
    system: "System text", systemNote: "Stands in front of the conversation.",
    temperature: "Temperature", temperatureNote: "0: always the likeliest token.",
    topP: "Top p", topPNote: "Draw from the likeliest only.",
    maxTokens: "Tokens at most", maxTokensNote: "Of one answer.",
    seed: "Seed", seedNote: "The same seed, the same answer.",
    theme: "Appearance", themeAuto: "As the device", themeLight: "Light", themeDark: "Dark",
    default: "server's default", unlimited: "no limit", random: "a new one",
    greeting: "Talk to {model}", greetingTwo: "Ask both, see both",
    hint: "This page speaks to this server and to nothing else.",
    hintTwo: "{first} and {second} get the same question and answer side by side.",
    you: "You", answerOf: "Answer of {model}", base: "base", tuned: "tuned",
    copy: "Copy", copied: "Copied", again: "Again", code: "code", copyCode: "Copy the code",
    thinking: "answering", stopped: "stopped", cut: "cut at the limit of tokens",
    tokens: "{n} tokens", seconds: "{s} s", empty: "(an empty answer)",
    announce: "{model} says: {text}", answering: "{model} is answering",
    loading: "The model is loading …", unreachable: "The server can't be reached.",
    broken: "The connection broke before the answer was whole.",
    missing_api_key: "This server asks for an API key: see Settings.",
    invalid_api_key: "The API key is wrong: see Settings.",
    queue_full: "The server is busy. Try again in a moment.",
    stopping: "The server is stopping.",
    context_length_exceeded: "The conversation is too long for the model. Begin a new one.",
    model_not_found: "The server no longer has this model. Reload the page.",
  },
  zh: {
    lang: "zh-CN", other: "EN", otherLabel: "Switch to English",
    skip: "跳到输入框", models: "模型", first: "模型", second: "并排对比的第二个模型",
    versus: "对比", none: "不对比", compare: "对比……", new: "新对话", settings: "设置", conversation: "对话",
    latest: "到最新一条", message: "你的消息", placeholder: "说点什么", send: "发送", stop: "停止",
    keys: "Enter 发送，Shift+Enter 换行，Esc 停止回答。",
    close: "关闭", done: "完成", undo: "撤销", cleared: "已开始新对话。",
    key: "API 密钥", keyNote: "这个服务需要密钥。只保存到关闭此标签页为止。",
    system: "系统提示", systemNote: "放在整段对话之前。",
    temperature: "温度", temperatureNote: "0：总取最可能的词。",
    topP: "Top p", topPNote: "只在最可能的词里抽取。",
    maxTokens: "最多词元数", maxTokensNote: "指一次回答。",
    seed: "随机种子", seedNote: "种子相同，回答相同。",
    theme: "外观", themeAuto: "跟随设备", themeLight: "浅色", themeDark: "深色",
    default: "服务器默认", unlimited: "不限", random: "每次不同",
    greeting: "和 {model} 聊聊", greetingTwo: "同一个问题，两份回答",
    hint: "本页只连接这台服务器，不连接别处。",
    hintTwo: "{first} 和 {second} 会同时回答同一个问题，并排显示。",
    you: "你", answerOf: "{model} 的回答", base: "原模型", tuned: "微调",
    copy: "复制", copied: "已复制", again: "重新回答", code: "代码", copyCode: "复制代码",
    thinking: "回答中", stopped: "已停止", cut: "已到词元上限",
    tokens: "{n} 个词元", seconds: "{s} 秒", empty: "（回答为空）",
    announce: "{model} 说：{text}", answering: "{model} 正在回答",
    loading: "模型加载中……", unreachable: "连不上服务器。",
    broken: "回答还没完，连接就断了。",
    missing_api_key: "这个服务需要 API 密钥，请在设置中填写。",
    invalid_api_key: "API 密钥不对，请在设置中修改。",
    queue_full: "服务器正忙，请稍后再试。",
    stopping: "服务器正在停止。",
    context_length_exceeded: "对话太长，模型放不下了。请开始新对话。",
    model_not_found: "服务器上已没有这个模型。请刷新页面。",
  },
};

let words = WORDS.en;

export function speak(language) {
  words = WORDS[language] || WORDS.en;
}

export function say(name, values = {}) {
  return words[name].replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

export function knows(name) {
  return name in words;
}

/** Puts the language's words where the page asks for them. */
export function translate(root) {
  document.documentElement.lang = words.lang;
  const each = (name, put) =>
    root.querySelectorAll(`[data-${name}]`).forEach((node) => put(node, say(node.dataset[name])));
  each("word", (node, text) => { node.textContent = text; });
  each("label", (node, text) => node.setAttribute("aria-label", text));
  each("title", (node, text) => { node.title = text; });
  each("placeholder", (node, text) => { node.placeholder = text; });
}
