// Loaded before the widget manager, on pages that hold ipywidgets: own files, working icons, names for screen readers.
(function () {
  window.__jupyter_widgets_assets_path__ = new URL("vendor/html-manager/", document.currentScript.src).href;
  // Registered before the manager registers, so it runs when the theme has its icons and no widget is there yet.
  window.addEventListener("load", function () {
    // Font Awesome would replace the <i> that a Play button keeps changing, and Play would stop working.
    if (window.FontAwesome) window.FontAwesome.noAuto();
    // The manager asks MathJax 2 to typeset its labels; this is MathJax 3.
    const mathjax = window.MathJax;
    if (mathjax && !mathjax.Hub) mathjax.Hub = { Queue: ([, , node]) => mathjax.typesetPromise?.([node]) };
    new MutationObserver(name).observe(document.body, { subtree: true, childList: true, attributeFilter: ["class"] });
  });

  const actions = { "fa-play": "Play", "fa-pause": "Pause", "fa-stop": "Stop", "fa-retweet": "Repeat" };
  function name() {
    for (const handle of document.querySelectorAll(".noUi-handle:not([aria-label])")) {
      const label = handle.closest(".jupyter-widgets").querySelector("label");
      handle.setAttribute("aria-label", (label && label.textContent) || "Slider");
    }
    for (const icon of document.querySelectorAll(".widget-play button > i")) {
      const text = actions[icon.classList[1]];
      if (text && icon.parentNode.getAttribute("aria-label") !== text) icon.parentNode.setAttribute("aria-label", text);
    }
    for (const image of document.querySelectorAll("img.widget-image:not([alt])")) {
      const labels = [...(image.closest(".cell_output") || document).querySelectorAll("label.widget-label")];
      image.alt = "Figure" + (labels.length ? " set by " + labels.map((label) => label.textContent).join(", ") : "");
    }
  }
})();
