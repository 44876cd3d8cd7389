//! Real work on a mount: a build, a repository, a database with several writers, copies there and back.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::support::{self, Argument, Volume, assert_same, bytes, python, run, tree};

const SOURCES: usize = 200;
const WRITERS: usize = 4;

/// A C project of many files that include each other, with a static and a shared library.
fn write_project(root: &Path) {
    fs::create_dir_all(root.join("src/include")).unwrap();
    let mut sum = String::new();
    for number in 0..SOURCES {
        let header = format!("#ifndef M{number}_H\n#define M{number}_H\nint f{number}(int);\n#endif\n");
        fs::write(root.join(format!("src/include/m{number}.h")), header).unwrap();
        let next = (number + 1) % SOURCES;
        let body = if next == 0 { "x".to_owned() } else { format!("x > 0 ? x + f{next}(x - 1) : {number}") };
        let source =
            format!("#include \"m{number}.h\"\n#include \"m{next}.h\"\nint f{number}(int x) {{ return {body}; }}\n");
        fs::write(root.join(format!("src/m{number}.c")), source).unwrap();
        write!(sum, " m{number}.o").unwrap();
    }
    let main = "#include <stdio.h>\n#include \"m0.h\"\nint main(void) { printf(\"%d\\n\", f0(100)); return 0; }\n";
    fs::write(root.join("src/main.c"), main).unwrap();
    let makefile = format!(
        "OBJECTS ={sum}\nCFLAGS = -O0 -fPIC -Iinclude -MMD\nall: program program-shared\n\
         libm.a: $(OBJECTS)\n\tar rcs $@ $(OBJECTS)\nlibm2.so: $(OBJECTS)\n\t$(CC) -shared -o $@ $(OBJECTS)\n\
         program: main.o libm.a\n\t$(CC) -o $@ main.o libm.a\n\
         program-shared: main.o libm2.so\n\t$(CC) -o $@ main.o -L. -lm2 -Wl,-rpath,'$$ORIGIN'\n-include *.d\n"
    );
    fs::write(root.join("src/Makefile"), makefile).unwrap();
}

#[test]
fn a_c_project_is_unpacked_and_built() {
    let volume = Volume::new(&[]);
    let source = tempfile::tempdir().unwrap();
    write_project(source.path());
    run("tar", &[&"--format=posix", &"-czf", &"project.tar.gz", &"src"], source.path());
    fs::copy(source.path().join("project.tar.gz"), volume.path("project.tar.gz")).unwrap();
    run("tar", &[&"-xzf", &"project.tar.gz"], &volume.plain);
    assert_same("unpacked", &tree(&volume.path("src")), &tree(&source.path().join("src")));
    run("make", &[&"-j2", &"-s"], &volume.path("src"));
    let expected = (1..=100).sum::<i32>() + 100;
    for program in ["program", "program-shared"] {
        assert_eq!(
            run(volume.path("src").join(program).to_str().unwrap(), &[], &volume.plain),
            format!("{expected}\n")
        );
    }
    let up_to_date = |when: &str| {
        let said = run("make", &[&"-j2"], &volume.path("src"));
        assert!(said.contains("Nothing to be done"), "{when}: {said}");
    };
    up_to_date("at once");
    volume.remount();
    up_to_date("after a remount");
    assert_eq!(run(volume.path("src/program-shared").to_str().unwrap(), &[], &volume.plain), format!("{expected}\n"));
    run("touch", &[&"src/include/m7.h"], &volume.plain);
    let again = run("make", &[&"-j2"], &volume.path("src"));
    assert!(again.contains("m6.c") && again.contains("m7.c") && !again.contains("m9.c"), "{again}");
    run("rm", &[&"-r", &"src"], &volume.plain);
    assert!(!volume.path("src").exists());
}

#[test]
fn a_git_repository_is_cloned_changed_collected_and_checked() {
    let volume = Volume::new(&[]);
    let outside = tempfile::tempdir().unwrap();
    let git = |directory: &Path, arguments: &[Argument<'_>]| {
        let identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "init.defaultBranch=main"];
        let mut all: Vec<Argument<'_>> = identity.iter().map(|word| word as Argument<'_>).collect();
        all.extend(arguments);
        run("git", &all, directory)
    };
    git(outside.path(), &[&"init", &"-q", &"origin"]);
    let origin = outside.path().join("origin");
    for commit in 0..10 {
        for number in 0..30 {
            let directory = origin.join(format!("d{}", number % 7));
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join(format!("file{number}")), bytes(commit * 100 + number, 2000)).unwrap();
        }
        git(&origin, &[&"add", &"-A"]);
        git(&origin, &[&"commit", &"-q", &"-m", &format!("commit {commit}")]);
    }
    git(&volume.plain, &[&"clone", &"-q", &"--no-local", &origin, &"clone"]);
    let clone = volume.path("clone");
    fs::write(clone.join("d1/file1"), "changed").unwrap();
    fs::write(clone.join("new"), "new").unwrap();
    fs::remove_file(clone.join("d2/file2")).unwrap();
    symlink("new", clone.join("link")).unwrap();
    git(&clone, &[&"add", &"-A"]);
    git(&clone, &[&"commit", &"-q", &"-m", &"on the mount"]);
    git(&clone, &[&"checkout", &"-q", &"-b", &"branch", &"HEAD~5"]);
    git(&clone, &[&"checkout", &"-q", &"main"]);
    git(&clone, &[&"gc", &"-q", &"--aggressive"]);
    let head = git(&clone, &[&"rev-parse", &"HEAD"]);
    let check = || {
        git(&clone, &[&"fsck", &"--full", &"--strict"]);
        assert_eq!(git(&clone, &[&"status", &"--porcelain"]), "");
        assert_eq!(git(&clone, &[&"rev-list", &"--count", &"HEAD"]).trim(), "11");
        assert_eq!(git(&clone, &[&"rev-parse", &"HEAD"]), head);
    };
    check();
    volume.remount();
    check();
    git(&clone, &[&"push", &"-q", &"origin", &"main:pushed"]);
    assert_eq!(git(&origin, &[&"rev-parse", &"pushed"]), head);
}

fn database(mode: &str, rounds: usize) {
    let volume = Volume::new(&[]);
    let path = volume.path("base.sqlite");
    let make = format!(
        "import sqlite3, sys
base = sqlite3.connect(sys.argv[1])
assert base.execute('pragma journal_mode={mode}').fetchone()[0] == '{mode}'
base.execute('create table entry (writer int, number int, text blob, unique (writer, number))')
base.commit()"
    );
    python(&make, &[&path], &volume.plain);
    let write = format!(
        "import sqlite3, sys
writer = int(sys.argv[2])
base = sqlite3.connect(sys.argv[1], timeout=100, isolation_level=None)
for number in range({rounds}):
    base.execute('begin immediate')
    base.execute('insert into entry values (?, ?, ?)', (writer, number, bytes([writer]) * (number * 37 % 9000)))
    if number % 5 == 4: base.execute('update entry set text = ? where writer = ? and number = ?', (b'new', writer, number - 2))
    base.execute('rollback' if number % 7 == 6 else 'commit')"
    );
    let start = |writer: usize| {
        let mut command = Command::new("python3");
        command.args(["-c", &write]).arg(&path).arg(writer.to_string()).spawn().expect("python3: .ci/run installs it")
    };
    let writers: Vec<_> = (0..WRITERS).map(start).collect();
    for mut writer in writers {
        assert!(writer.wait().unwrap().success());
    }
    let check = "import sqlite3, sys
base = sqlite3.connect(sys.argv[1])
assert base.execute('pragma integrity_check').fetchall() == [('ok',)]
for writer, number, text in base.execute('select * from entry'):
    assert text in (b'new', bytes([writer]) * (number * 37 % 9000)), (writer, number)
print(base.execute('select count(*) from entry').fetchone()[0])";
    let kept = (0..rounds).filter(|number| number % 7 != 6).count() * WRITERS;
    assert_eq!(python(check, &[&path], &volume.plain).trim(), kept.to_string());
    volume.remount();
    assert_eq!(python(check, &[&path], &volume.plain).trim(), kept.to_string());
    // The process is gone without a word, and what was committed is there.
    python(&write.replace("int(sys.argv[2])", "99"), &[&path], &volume.plain);
    volume.kill();
    volume.mount();
    assert_eq!(python(check, &[&path], &volume.plain).trim(), (kept / WRITERS * (WRITERS + 1)).to_string());
}

#[test]
fn a_sqlite_database_with_a_write_ahead_log_has_four_writers() {
    database("wal", 60);
}

#[test]
fn a_sqlite_database_with_a_rollback_journal_has_four_writers() {
    database("delete", 40);
}

#[test]
fn rsync_there_and_back_finds_no_difference() {
    let volume = Volume::new(&[]);
    let source = tempfile::tempdir().unwrap();
    write_project(source.path());
    for (number, size) in (0..).zip([0, 1, 4047, 4048, 4049, 4096, 1_000_000, 5_000_000]) {
        fs::write(source.path().join(format!("binary{number}")), bytes(number, size)).unwrap();
    }
    symlink("binary3", source.path().join("link")).unwrap();
    fs::hard_link(source.path().join("binary4"), source.path().join("hard")).unwrap();
    fs::write(source.path().join("n".repeat(250)), "long").unwrap();
    let times = support::walk(source.path());
    (0..).zip(&times).for_each(|(number, path)| support::set_times(path, 1_234_567_890 + number, 123_456_789));

    let slashed = |path: &Path| format!("{}/", path.display());
    let (from, back) = (slashed(source.path()), volume.home.path("back"));
    fs::create_dir(volume.path("copy")).unwrap();
    let on_mount = slashed(&volume.path("copy"));
    let copy = |from: &str, to: &str| run("rsync", &[&"-aH", &from, &to], Path::new("/"));
    let same = |left: &str, right: &str| {
        let said = run("rsync", &[&"-aHnc", &"--delete", &"--itemize-changes", &left, &right], Path::new("/"));
        assert_eq!(said, "", "{left} {right}");
    };
    copy(&from, &on_mount);
    same(&from, &on_mount);
    copy(&on_mount, &slashed(&back));
    same(&from, &slashed(&back));
    volume.remount();
    same(&from, &on_mount);
    same(&on_mount, &slashed(&back));
    assert_same("the copy", &tree(&volume.path("copy")), &tree(source.path()));
    // The second time there is nothing to copy; a change is found.
    assert_eq!(run("rsync", &[&"-aH", &"--itemize-changes", &from, &on_mount], Path::new("/")), "");
    fs::write(source.path().join("binary6"), bytes(66, 999_999)).unwrap();
    run("rsync", &[&"-aH", &"--inplace", &"--no-whole-file", &from, &on_mount], Path::new("/"));
    same(&from, &on_mount);
}
