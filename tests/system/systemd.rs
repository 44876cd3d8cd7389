//! Under a service manager: what it is told and when, and the units that are shipped.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::{self, Home, Volume};
use rustix::process::Signal;

fn receive(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 512];
    let len = socket.recv(&mut buffer).unwrap();
    String::from_utf8(buffer[..len].to_vec()).unwrap()
}

/// READY comes when the mount can be used and not before; the watchdog hears of it as long as it lives; STOPPING comes at
/// the end.
#[test]
fn a_service_manager_is_told() {
    let volume = Volume::new(&[]);
    volume.unmount();
    let path = volume.home.path("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let Volume { home, cipher, plain, .. } = &volume;
    let mut home_with_manager = Home::new();
    for (name, place) in [("XDG_DATA_HOME", "data"), ("XDG_STATE_HOME", "state"), ("XDG_RUNTIME_DIR", "run")] {
        home_with_manager.set(name, home.path(place));
    }
    home_with_manager.set("NOTIFY_SOCKET", &path);
    home_with_manager.set("WATCHDOG_USEC", "200000");
    let running = home_with_manager.start("kmsfs", &[&"mount", &"--foreground", cipher, plain]);
    let ready = receive(&manager);
    assert!(ready.starts_with("READY=1\nMAINPID="), "{ready}");
    assert!(Home::is_mounted(plain));
    fs::write(plain.join("file"), "live").unwrap();
    assert_eq!(receive(&manager), "WATCHDOG=1");
    assert_eq!(receive(&manager), "WATCHDOG=1");
    running.signal(Signal::TERM);
    let end = std::iter::repeat_with(|| receive(&manager)).find(|told| told != "WATCHDOG=1").unwrap();
    assert!(end.starts_with("STOPPING=1"), "{end}");
    assert_eq!(running.end(), Some(0));
}

#[test]
fn a_mount_in_the_background_is_no_service() {
    let mut home = Home::new();
    let path = home.path("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_nonblocking(true).unwrap();
    home.set("NOTIFY_SOCKET", &path);
    let volume = Volume::in_home(home, &[], &[]);
    volume.unmount();
    assert!(manager.recv(&mut [0; 64]).is_err());
}

#[test]
fn the_units_are_valid() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        println!("left out: systemd-analyze is not installed");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd");
    let unit = fs::read_to_string(shipped.join("kmsfs@.service")).unwrap();
    // The program need not be installed where the unit says, only be one.
    let unit = unit.replace("/usr/bin/kmsfs", env!("CARGO_BIN_EXE_kmsfs"));
    fs::write(directory.path().join("kmsfs@test.service"), unit).unwrap();
    fs::copy(shipped.join("kmsfs.target"), directory.path().join("kmsfs.target")).unwrap();
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(directory.path().join("kmsfs@test.service"))
        .output()
        .unwrap();
    let said = support::text(&output.stderr);
    let ours: Vec<_> = said.lines().filter(|line| line.contains("kmsfs")).collect();
    assert!(output.status.success() && ours.is_empty(), "{said}");
}
