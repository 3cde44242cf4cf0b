// The chosen theme, before anything is drawn: a plain script in the head, so that no page flashes white in a
// dark room. settings.js changes it later by the same two names.
const theme = localStorage.getItem("corolla-theme");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
