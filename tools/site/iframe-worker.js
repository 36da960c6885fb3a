// Search from a folder: a browser starts no worker from file://, so its script runs in an empty frame and is spoken to in the same way
class FrameWorker extends EventTarget {
  constructor(url) {
    super()
    const frame = document.createElement('iframe')
    frame.hidden = true
    this.window = new Promise(ready => frame.onload = () => {
      frame.onload = null
      const w = frame.contentWindow, script = w.document.createElement('script')
      w.postMessage = data => this.dispatchEvent(new MessageEvent('message', {data}))
      script.onload = () => ready(w)
      script.src = new URL(url, document.baseURI)
      w.document.body.append(script)
    })
    document.body.append(frame)
  }
  postMessage(data) { this.window.then(w => w.dispatchEvent(new w.MessageEvent('message', {data}))) }
}
if (location.protocol == 'file:') window.Worker = FrameWorker
