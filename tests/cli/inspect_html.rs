//! The page of `kmsfs inspect --html`: what it says, that nothing in a header becomes markup, and, in a headless Chromium, that it
//! draws itself and can be used with a keyboard.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{self, Volume, bytes, flip};

/// A volume that is not mounted, with a file of three pages; returns its ciphertext file too.
fn volume() -> (Volume, PathBuf) {
    let volume = Volume::new(&[]);
    fs::write(volume.path("file"), bytes(1, 3 * 4048)).unwrap();
    let cipher = volume.behind("file");
    volume.unmount();
    (volume, cipher)
}

fn page(volume: &Volume) -> PathBuf {
    volume.home.path("page.html")
}

/// The data that the page draws.
fn data(page: &Path) -> serde_json::Value {
    let text = fs::read_to_string(page).unwrap();
    let data = text.split(r#"id="envelope">"#).nth(1).unwrap().split("</script>").next().unwrap();
    serde_json::from_str(data).unwrap()
}

#[test]
fn it_says_what_holds_and_what_does_not() {
    let (volume, cipher) = volume();
    volume.home.ok(&[&"inspect", &"--html", &page(&volume), &cipher]);
    let whole = data(&page(&volume));
    assert_eq!(whole["verdict"]["kind"], "good", "{whole}");
    assert_eq!((&whole["plain_size"], &whole["pages"]["count"]), (&12144.into(), &3.into()));
    flip(&cipher, 8192 + 100);
    volume.home.refused(13, &[&"inspect", &"--html", &page(&volume), &cipher]);
    let damaged = data(&page(&volume));
    let states: Vec<_> = damaged["pages"]["list"].as_array().unwrap().iter().map(|page| &page["state"]).collect();
    assert_eq!(states, ["authentic", "damaged", "authentic"]);
    // Without the key it says so, and shows the rest.
    fs::remove_file(volume.home.path("data/kmsfs/keyring.toml")).unwrap();
    volume.home.ok(&[&"inspect", &"--html", &page(&volume), &cipher]);
    let locked = data(&page(&volume));
    assert_eq!(
        (&locked["verdict"]["kind"], &locked["pages"]["list"][0]["state"]),
        (&"open".into(), &"unchecked".into())
    );
    assert_eq!(locked["slots"][0]["fields"][0]["name"], "magic");
}

#[test]
fn what_cannot_be_drawn_is_refused() {
    let (volume, cipher) = volume();
    let said = volume.home.refused(2, &[&"inspect", &"--html", &page(&volume), &volume.cipher]);
    assert!(said.contains("is a directory"), "{said}");
    let before = fs::read(&cipher).unwrap();
    volume.home.refused(2, &[&"inspect", &"--html", &cipher, &cipher]);
    assert_eq!(fs::read(&cipher).unwrap(), before);
    volume.home.refused(2, &[&"inspect", &"--html", &page(&volume), &cipher, &cipher]);
    volume.home.refused(14, &[&"inspect", &"--html", &page(&volume), &"nothing"]);
}

/// Who writes a header decides what its key is called.
#[test]
fn a_header_cannot_bring_markup() {
    let (volume, cipher) = volume();
    let mut disk = fs::read(&cipher).unwrap();
    let key_id = disk.windows(2).position(|pair| pair == b"k-").unwrap();
    disk[key_id..key_id + 18].copy_from_slice(b"</script><b>x</b>!");
    fs::write(&cipher, disk).unwrap();
    volume.home.refused(13, &[&"inspect", &"--html", &page(&volume), &cipher]);
    let text = fs::read_to_string(page(&volume)).unwrap();
    assert!(text.contains("\\u003c/script>\\u003cb>x") && !text.contains("<b>x"));
    assert_eq!(data(&page(&volume))["slots"][0]["records"][0]["key"], "</script><b>x</b>!");
}

/// Chromium's view of a page: its document after its scripts have run.
fn dom(page: &Path, arguments: &[&str]) -> Option<String> {
    let program = ["chromium", "chromium-browser", "google-chrome"]
        .into_iter()
        .find(|name| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success()));
    let Some(program) = program else {
        println!("skipped: there is no chromium here");
        return None;
    };
    let profile = tempfile::tempdir().unwrap();
    let output = Command::new("timeout")
        .args(["90", program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(["--virtual-time-budget=5000", "--dump-dom"])
        .args(arguments)
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", support::text(&output.stderr));
    Some(support::text(&output.stdout))
}

#[test]
fn a_browser_draws_it_and_a_keyboard_moves_through_it() {
    let (volume, cipher) = volume();
    flip(&cipher, 8192 + 100);
    volume.home.refused(13, &[&"inspect", &"--html", &page(&volume), &cipher]);
    // A reader at the keyboard: the first field, one to the right, then the last page.
    let reader = r#"<script>
        const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        const said = [];
        document.querySelector(".fields button").focus();
        press("ArrowRight");
        said.push(document.activeElement.textContent, document.querySelector(".detail h3").textContent);
        said.push(document.querySelectorAll(".dump span.on").length);
        document.querySelector(".grid button").focus();
        press("End");
        said.push(document.activeElement.getAttribute("aria-label"));
        said.push(document.querySelectorAll(".fields button[tabindex='0'], .grid button[tabindex='0']").length);
        document.title = said.join("|");
        </script></body>"#;
    let text = fs::read_to_string(page(&volume)).unwrap().replace("</body>", reader);
    fs::write(page(&volume), text).unwrap();
    let Some(dom) = dom(&page(&volume), &[]) else { return };
    assert!(dom.contains("<title>version|version|1|Page 2, authentic|2</title>"), "{dom}");
    for words in ["1 of 3 pages do not authenticate", "Page 1, damaged", "fingerprint", "aria-live=\"polite\""] {
        assert!(dom.contains(words), "{words}: {dom}");
    }
}
