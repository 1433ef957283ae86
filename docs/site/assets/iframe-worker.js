// Browsers start no worker for a page that is opened from a folder. Then a hidden frame does the search's work.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inner = frame.contentWindow;
      addEventListener("message", (event) => {
        if (event.source !== this.inner) return;
        const message = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(message);
        if (this.onmessage) this.onmessage(message);
      });
      const page = this.inner.document;
      page.open();
      page.write("<!doctype html><html><body></body></html>");
      page.close();
      const bridge = page.createElement("script");
      bridge.textContent = "postMessage = (data) => parent.postMessage(data, '*');";
      const script = page.createElement("script");
      this.ready = new Promise((done) => (script.onload = done));
      script.src = url;
      page.body.append(bridge, script);
    }

    postMessage(data) {
      this.ready.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.inner.frameElement.remove();
    }
  };
}
