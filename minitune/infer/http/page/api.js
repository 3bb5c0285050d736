// The server's OpenAI-compatible routes, as far as the page needs them.
import { key } from "./store.js";

export class ApiError extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(error.message, "unreachable");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new ApiError(body.error?.message || `HTTP ${response.status}`, body.error?.code);
  }
  return response;
}

/** [{id, parent}]; parent is null for the base. */
export async function models() {
  return (await (await call("/v1/models")).json()).data;
}

/** Yields {text}, then {finish, tokens}. Raises ApiError; AbortError when `signal` stops it. */
export async function* chat(request, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await call("/v1/chat/completions", { method: "POST", body, signal });
  let finish = null;
  for await (const data of events(response.body.getReader())) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, chunk.error.code);
    const choice = chunk.choices[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: (finish = choice.finish_reason) };
    if (chunk.usage) yield { tokens: chunk.usage.completion_tokens };
  }
  if (!finish) throw new ApiError("the stream ended early", "broken");
}

/** The data of server-sent events; comments are left out. */
async function* events(reader) {
  const decoder = new TextDecoder();
  let buffer = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError(error.message, "broken");
      }
      buffer += decoder.decode(part.value || new Uint8Array(), { stream: !part.done });
      let end;
      while ((end = buffer.indexOf("\n\n")) >= 0) {
        const event = buffer.slice(0, end);
        buffer = buffer.slice(end + 2);
        if (event.startsWith("data: ")) yield event.slice(6);
      }
      if (part.done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
