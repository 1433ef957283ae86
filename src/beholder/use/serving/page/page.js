"use strict";
// Talk to the model behind this server. Everything the model or the server says is inserted as text, never as HTML.

const $ = (id) => document.getElementById(id);
const ASK_TOKENS = 256;
const STEPS = [Math.log(2), Math.log(10), Math.log(100)]; // nats at which a word gets a darker colour

let key = null; // in memory only
let model = null;
let messages = []; // the conversation as the server takes it
let sent = []; // pictures of the conversation, in the order of their numbers
let past = []; // pictures of conversations before it that are still on the page
let pending = []; // pictures to be sent with the next question
let running = null; // AbortController of what is being answered
let talk = 0; // which conversation this is: what belongs to an earlier one is dropped

// -------------------------------------------------------------------------------------------------------------------
// The server

class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function request(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, credentials: "omit",
      redirect: "error", cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.", 0);
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  if (response.status === 401) askForKey();
  throw new ServerError(told?.error?.message ?? `The server answers with status ${response.status}.`, response.status);
}

// The answer in pieces; gives the reason why it ended.
async function stream(body, onPiece, signal) {
  const response = await request("v1/chat/completions", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  let reason = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const events = (waiting + value).split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const told = JSON.parse(data);
      if (told.error) throw new ServerError(told.error.message, 500);
      for (const choice of told.choices) {
        if (choice.delta.content) onPiece(choice.delta.content);
        reason = choice.finish_reason ?? reason;
      }
    }
  }
  if (reason === null) throw new ServerError("The server broke off before the answer was over.", 0);
  return reason;
}

async function connect() {
  try {
    model = (await (await request("v1/models")).json()).data[0];
    $("model").textContent = model.id;
    document.title = `${model.id} · Beholder`;
    $("key-form").hidden = true;
    if (!model.chats) $("question").placeholder = "Describe the picture (a text is not needed)";
    tellTray();
    return true;
  } catch (error) {
    showError(error.message);
    return false;
  }
}

function askForKey() {
  key = null;
  $("key-form").hidden = false;
  $("key").focus();
}

// -------------------------------------------------------------------------------------------------------------------
// Pictures

async function addFiles(files) {
  const pictures = [...files].filter((file) => file.type.startsWith("image/"));
  if (!pictures.length) {
    if (files.length) showError("That is not a picture.");
    return;
  }
  showError("");
  const most = model?.max_images ?? Infinity;
  if (most === 1 && pictures.length === 1) pending.splice(0).forEach(forget);
  for (const file of pictures) {
    if (pending.length >= most) {
      showError(most === 0 ? "This server takes no pictures." : `This model looks at no more than ${count(most, "picture")} at a time.`);
      break;
    }
    const picture = { name: file.name || "pasted picture", shown: URL.createObjectURL(file), url: null };
    pending.push(picture);
    picture.read = readAsUrl(file).then((url) => { picture.url = url; });
  }
  drawTray();
}

function readAsUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new ServerError(`${file.name} cannot be read.`, 0));
    reader.readAsDataURL(file);
  });
}

function forget(picture) {
  URL.revokeObjectURL(picture.shown);
}

function startsOver() {
  return sent.length > 0 && pending.length > 0 && sent.length + pending.length > (model?.max_images ?? Infinity);
}

function drawTray() {
  const before = startsOver() ? 0 : sent.length;
  $("tray").replaceChildren(...pending.map((picture, k) => {
    const item = drawPicture(picture, before + k + 1);
    const remove = make("button", "remove", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove picture ${before + k + 1}, ${picture.name}`);
    remove.addEventListener("click", () => {
      forget(picture);
      pending = pending.filter((other) => other !== picture);
      drawTray();
      ($("tray").querySelectorAll("button")[Math.min(k, pending.length - 1)] ?? $("question")).focus();
    });
    item.append(remove);
    return item;
  }));
  tellTray();
}

function tellTray() {
  $("tray-note").textContent = !startsOver() ? ""
    : model.max_images === 1 ? "This model looks at one picture, so a new one begins a new conversation."
      : `This model looks at ${model.max_images} pictures at most, so these begin a new conversation.`;
  $("clear").disabled = !(pending.length || messages.length || $("turns").children.length);
}

function drawPicture(picture, number) {
  const item = make("li", "picture");
  const image = make("img");
  image.src = picture.shown;
  image.alt = `Picture ${number}: ${picture.name}`;
  const label = make("span", "number", String(number));
  label.setAttribute("aria-hidden", "true");
  item.append(image, label);
  return item;
}

// -------------------------------------------------------------------------------------------------------------------
// Asking

async function ask() {
  if (running) return;
  if (!model && !(await connect())) return;
  const question = $("question").value.trim();
  if (!question && model.chats) return refuse("Type a question first.");
  if (!model.chats && !pending.length) return refuse("Add a picture first.");
  showError("");
  if (!model.chats || startsOver()) startOver();

  const mine = talk;
  const pictures = pending;
  const controller = running = new AbortController();
  working(true);
  try {
    await Promise.all(pictures.map((picture) => picture.read));
  } catch (error) {
    if (mine === talk) working(false);
    return showError(error.message);
  }
  if (mine !== talk) return;
  const images = pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } }));
  const user = { role: "user", content: question ? [...images, { type: "text", text: question }] : images };
  const asked = { model: model.id, messages: [...messages, user] };
  const numImages = sent.length + pictures.length;
  const checked = $("check").checked && numImages > 0;
  const turn = drawTurn(question, pictures, numImages, checked);
  pending = [];
  $("question").value = "";
  drawTray();
  const tokens = { max_tokens: Math.min(ASK_TOKENS, model.max_tokens) };
  const hidden = checked ? write(turn.hidden, { ...asked, ...tokens, hide_images: true }, controller, () => {}) : null;
  const speak = speaker();
  const { text, error, stopped } = await write(turn.shown, { ...asked, ...tokens }, controller, speak.piece);
  if (mine !== talk) return;
  speak.end();
  if (error) {
    controller.abort();
    turn.item.remove();
    pending = [...pictures, ...pending];
    $("question").value = $("question").value || question;
    showError(error.message);
  } else if (!text) {
    turn.shown.ended.textContent = stopped ? "Stopped before a word was said." : "The model ended without a word.";
    pending = [...pictures, ...pending];
  } else {
    messages = [...asked.messages, { role: "assistant", content: text }];
    sent = [...sent, ...pictures];
    let found = null;
    if (checked && !stopped) {
      try {
        found = await (await request("v1/looks", { model: model.id, messages }, controller.signal)).json();
      } catch (failure) {
        if (failure.name !== "AbortError") turn.tell(`How much the picture explains could not be measured: ${failure.message}`);
      }
    }
    if (mine !== talk) return;
    if (found) turn.colour(found);
    const other = await hidden;
    if (mine !== talk) return;
    if (found) turn.judge(found, text, other?.error || other?.stopped ? null : other.text);
  }
  working(false);
  drawTray();
}

// Writes an answer into its place as it comes.
async function write(place, body, controller, onPiece) {
  let text = "";
  let failed = null;
  let stopped = false;
  place.text.setAttribute("aria-busy", "true");
  try {
    const reason = await stream(body, (piece) => {
      text += piece;
      place.text.append(piece);
      onPiece(piece);
      follow();
    }, controller.signal);
    if (reason === "length") place.ended.textContent = `Cut after ${body.max_tokens} tokens.`;
  } catch (error) {
    if (error.name === "AbortError") {
      stopped = true;
      place.ended.textContent = "Stopped.";
    } else {
      failed = error instanceof ServerError ? error : new ServerError("The connection broke off.", 0);
      place.ended.textContent = failed.message;
      place.ended.classList.add("bad");
    }
  }
  place.text.removeAttribute("aria-busy");
  return { text, error: failed, stopped };
}

function working(yes) {
  const focused = document.activeElement;
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  if (yes && focused === $("send")) $("stop").focus();
  if (!yes && (focused === $("stop") || focused === document.body)) $("question").focus();
  if (!yes) running = null;
  tellTray();
}

function refuse(why) {
  showError(why);
  $("question").focus();
}

function showError(text) {
  $("error").textContent = text;
}

function startOver() {
  if (!messages.length) return;
  past = [...past, ...sent];
  sent = [];
  messages = [];
  $("turns").append(make("li", "divider", "New conversation"));
}

function clear() {
  running?.abort();
  talk += 1;
  [...past, ...sent, ...pending].forEach(forget);
  past = [];
  sent = [];
  pending = [];
  messages = [];
  $("turns").replaceChildren();
  $("live").replaceChildren();
  $("question").value = "";
  $("empty").hidden = false;
  showError("");
  working(false);
  drawTray();
  $("question").focus();
}

// Reads the answer out for screen readers, a sentence at a time rather than a syllable at a time.
function speaker() {
  let waiting = "";
  $("live").replaceChildren();
  const say = (text) => { if (text.trim()) $("live").append(make("span", "", `${text.trim()} `)); };
  return {
    piece(text) {
      waiting += text;
      const end = waiting.search(/[.!?。！？]\s+\S*$/);
      if (end < 0) return;
      say(waiting.slice(0, end + 1));
      waiting = waiting.slice(end + 1);
    },
    end() { say(waiting); },
  };
}

function announce(text) {
  $("live").append(make("span", "", `${text} `));
}

// -------------------------------------------------------------------------------------------------------------------
// What is shown

function make(tag, className = "", text = null) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== null) element.textContent = text;
  return element;
}

function count(n, noun) {
  return `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
}

function follow() {
  const page = document.scrollingElement;
  if (page.scrollHeight - page.scrollTop - page.clientHeight < 160) page.scrollTop = page.scrollHeight;
}

function drawTurn(question, pictures, numImages, checked) {
  $("empty").hidden = true;
  const item = $("turn").content.firstElementChild.cloneNode(true);
  item.querySelector(".said").textContent = question;
  item.querySelector(".pictures").append(...pictures.map((picture, k) => drawPicture(picture, sent.length + k + 1)));
  const [shown, hidden] = [...item.querySelectorAll(".answer")].map((section) => ({
    section, text: section.querySelector(".text"), ended: section.querySelector(".ended"),
  }));
  const pictureWord = numImages > 1 ? "pictures" : "picture";
  shown.section.querySelector("h3").textContent = numImages ? `With the ${pictureWord}` : "Answer";
  hidden.section.querySelector("h3").textContent = `${numImages > 1 ? "Pictures" : "Picture"} hidden`;
  hidden.section.hidden = !checked;
  $("turns").append(item);
  document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
  const looks = item.querySelector(".looks");
  return {
    item, shown, hidden,
    tell(text) {
      shown.ended.textContent = text;
      shown.ended.classList.add("bad");
    },
    colour(found) {
      const spans = found.words.map((word) => make("span", "word", word.text));
      shown.text.replaceChildren(...spans);
      const by = (image) => found.words.map((word, k) => {
        const nats = image === null ? word.explained : word.explained_by_image[image];
        spans[k].className = `word ${word.counts ? level(nats) : ""}`.trim();
        return nats;
      });
      const draw = (image) => drawNumbers(looks, found, by(image), image);
      let now = null;
      const choose = (image) => { now = image; draw(image); };
      choose(null);
      spans.forEach((span, k) => {
        const point = () => {
          spans.forEach((other) => other.classList.toggle("pointed", other === span));
          looks.querySelector(".detail").textContent = inNumbers(found.words[k], now);
        };
        span.addEventListener("pointerenter", point);
        span.addEventListener("click", point);
      });
      if (found.images > 1) drawChoice(looks.querySelector(".which"), found.images, choose);
      looks.hidden = false;
      follow();
    },
    judge(found, text, hiddenText) {
      const [head, rest] = verdict(found, text, hiddenText);
      looks.querySelector(".verdict").replaceChildren(make("strong", "", head), ` ${rest}`);
      announce(`${head} ${rest}`);
      follow();
    },
  };
}

function drawChoice(fieldset, numImages, choose) {
  const name = `which-${$("turns").children.length}-${Date.now()}`;
  const names = ["all pictures", ...Array.from({ length: numImages }, (_, k) => `picture ${k + 1}`)];
  fieldset.append(...names.map((text, k) => {
    const label = make("label");
    const radio = make("input");
    radio.type = "radio";
    radio.name = name;
    radio.checked = k === 0;
    radio.addEventListener("change", () => choose(k === 0 ? null : k - 1));
    label.append(radio, text);
    return label;
  }));
  fieldset.hidden = false;
}

function drawNumbers(looks, found, nats, image) {
  looks.querySelector("tbody").replaceChildren(...found.words.map((word, k) => {
    const row = make("tr");
    const head = make("th", "", word.text.trim() || "(space)");
    head.scope = "row";
    row.append(head, ...[percent(total(word, null)), percent(total(word, image, true)), signed(nats[k])].map((text) => make("td", "", text)));
    return row;
  }));
}

// Log-probability of a word, nats: shown, or with all images (null) or one of them hidden.
function total(word, image, isHidden = false) {
  const of = (token) => !isHidden ? token.logprob : image === null ? token.logprob_hidden : token.logprob_hidden_by_image[image];
  return word.tokens.reduce((sum, token) => sum + of(token), 0);
}

function level(nats) {
  const reached = STEPS.filter((step) => Math.abs(nats) >= step - 1e-9).length;
  return reached === 0 ? "" : nats > 0 ? `up${reached}` : `down${Math.min(reached, 2)}`;
}

function signed(nats) {
  const text = nats.toFixed(2);
  return Number(text) === 0 ? "0.00" : nats > 0 ? `+${text}` : text.replace("-", "−");
}

function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return p < 0.01 ? "<0.01 %" : `${p < 1 ? p.toFixed(2) : p < 99.95 ? p.toFixed(1) : "100"} %`;
}

function times(nats) {
  const factor = Math.exp(Math.abs(nats));
  if (factor >= 1e6) return "more than a million times";
  if (factor < 1.05) return null;
  return `${factor < 10 ? factor.toFixed(1) : Math.round(factor).toLocaleString("en")} times`;
}

function inNumbers(word, image) {
  const nats = image === null ? word.explained : word.explained_by_image[image];
  const what = image === null ? "hidden" : `picture ${image + 1} hidden`;
  return `“${word.text.trim()}”: ${percent(total(word, null))} with the picture, `
    + `${percent(total(word, image, true))} with ${image === null ? "it" : what.replace(" hidden", "")} hidden (${signed(nats)} nats)`;
}

function verdict(found, text, hiddenText) {
  const { words, explained, against, nats } = found.summary;
  const several = found.images > 1;
  const it = several ? "the pictures" : "the picture";
  const [does, its] = several ? ["explain", "Pictures"] : ["explains", "Picture"];
  const named = (wanted) => {
    const those = [...new Set(found.words.filter((w) => w.counts && wanted(w.explained)).map((w) => w.text.trim()))];
    return those.length > 6 ? `${those.slice(0, 6).join(", ")}, …` : those.join(", ");
  };
  const threshold = found.summary.threshold;
  const rest = [];
  let head;
  if (!words) return ["There is no word to look at.", ""];
  if (explained) {
    head = "It looked.";
    const those = named((x) => x >= threshold);
    rest.push(words === 1 ? `${cap(it)} ${does} its one word, ${those}.`
      : `${cap(it)} ${does} ${explained === words ? `all ${words}` : `${explained} of ${words}`} words: ${those}.`);
  } else {
    head = against ? "It did not go by what it saw." : several ? "It did not need the pictures." : "It did not need the picture.";
    rest.push(`${cap(it)} ${does} none of ${words === 1 ? "its one word" : `its ${count(words, "word")}`}.`);
  }
  if (against) rest.push(`${cap(it)} ${several ? "speak" : "speaks"} against ${named((x) => x <= -threshold)}.`);
  const factor = times(nats);
  if (factor) rest.push(`The whole answer is ${factor} ${nats > 0 ? "as likely with" : "as likely without"} ${several ? "them" : "it"}.`);
  if (hiddenText !== null && hiddenText.trim() === text.trim()) rest.push(`${its} hidden, it answers the same.`);
  return [head, rest.join(" ")];
}

function cap(text) {
  return text[0].toUpperCase() + text.slice(1);
}

// -------------------------------------------------------------------------------------------------------------------
// Events

$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
$("pick").addEventListener("change", (event) => {
  addFiles(event.target.files);
  event.target.value = "";
  $("question").focus();
});
$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  showError("");
  if (await connect()) $("question").focus();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
document.addEventListener("paste", (event) => {
  const files = event.clipboardData?.files;
  if (!files?.length) return;
  event.preventDefault();
  addFiles(files);
});
let depth = 0; // drag events come from every element below
const over = (change) => {
  depth = Math.max(0, depth + change);
  document.body.classList.toggle("over", depth > 0);
};
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => { if (hasFiles(event)) over(1); });
document.addEventListener("dragleave", (event) => { if (hasFiles(event)) over(-1); });
document.addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  over(-Infinity);
  addFiles(event.dataTransfer.files);
});

(async () => {
  const health = await request("health").then((response) => response.json()).catch(() => null);
  if (health?.needs_key) askForKey();
  else await connect();
})();
