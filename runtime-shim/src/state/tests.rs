use super::*;

fn meta(id: &str, name: &str, auto_remove: bool) -> Meta {
    Meta {
        id: id.into(),
        name: name.into(),
        image: "busybox".into(),
        image_id: "sha256:0".into(),
        command: vec!["true".into()],
        created: 1,
        auto_remove,
        ..Meta::default()
    }
}

fn root() -> (tempfile::TempDir, StateRoot) {
    let dir = tempfile::tempdir().unwrap();
    let root = StateRoot::open(&dir.path().join("state"), "default").unwrap();
    (dir, root)
}

#[test]
fn create_with_a_used_name_is_refused_and_leaves_the_owner_alone() {
    let (_dir, root) = root();
    let first = root.create(&meta("aaa", "web", false)).unwrap();
    let error = root.create(&meta("bbb", "web", false)).unwrap_err();
    assert!(matches!(error, StateError::NameInUse { id, .. } if id == "aaa"));
    assert!(!root.path_of("bbb").exists());
    assert_eq!(root.find("web").unwrap().meta.id, "aaa");
    first.remove().unwrap();
    root.create(&meta("ccc", "web", false)).unwrap();
}

#[test]
fn reclaim_dead_with_live_sandbox_leaves_it() {
    let (_dir, root) = root();
    let live = root.create(&meta("aaa", "a", true)).unwrap();
    root.reclaim_dead().unwrap();
    assert!(live.path().exists());
}

#[test]
fn reclaim_dead_after_a_death_removes_what_was_to_be_removed() {
    let (dir, root) = root();
    let scratch = dir.path().join("scratch.img");
    std::fs::write(&scratch, "x").unwrap();
    let sandbox = root.create(&meta("aaa", "a", true)).unwrap();
    let taken = Taken::File {
        path: scratch.clone(),
    };
    sandbox.journal().record(&taken).unwrap();
    drop(sandbox);
    root.reclaim_dead().unwrap();
    assert!(!scratch.exists());
    assert!(!root.path_of("aaa").exists());
    assert!(root.containers().unwrap().is_empty());
}

#[test]
fn reclaim_dead_with_kept_container_marks_it_exited() {
    let (_dir, root) = root();
    let sandbox = root.create(&meta("aaa", "a", false)).unwrap();
    let running = Status {
        state: State::Running,
        ..Status::default()
    };
    sandbox.write_status(&running).unwrap();
    drop(sandbox);
    root.reclaim_dead().unwrap();
    let container = root.find("a").unwrap();
    assert_eq!(container.status.state, State::Exited);
    assert_eq!(container.status.exit_code, KILLED);
}

#[test]
fn create_while_others_tidy_up_always_succeeds() {
    let (dir, root) = root();
    let state = dir.path().join("state");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let tidier = scope.spawn(|| {
            let root = StateRoot::open(&state, DEFAULT_NAMESPACE).unwrap();
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                assert!(root.reclaim_dead().unwrap().is_empty());
            }
        });
        for number in 0..500 {
            let id = format!("id{number}");
            let sandbox = root.create(&meta(&id, &id, true)).unwrap();
            assert!(sandbox.path().join("meta.json").exists());
            sandbox.remove().unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        tidier.join().unwrap();
    });
}

#[test]
fn reclaim_dead_removes_at_once_what_a_dead_process_was_making() {
    let (_dir, root) = root();
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let dead = root.dir.join(format!(".{}-aaa", child.id()));
    child.wait().unwrap();
    let ours = root.dir.join(format!(".{}-bbb", std::process::id()));
    for dir in [&dead, &ours] {
        std::fs::create_dir(dir).unwrap();
    }
    assert!(root.reclaim_dead().unwrap().is_empty());
    assert!(!dead.exists() && ours.exists());
    assert!(root.containers().unwrap().is_empty());
}

#[test]
fn create_of_one_name_by_many_gives_it_to_one() {
    let (_dir, root) = root();
    let won = std::thread::scope(|scope| {
        let claims: Vec<_> = (0..16)
            .map(|number| {
                let root = &root;
                scope.spawn(move || root.create(&meta(&format!("id{number}"), "web", true)))
            })
            .collect();
        let claims: Vec<_> = claims.into_iter().map(|c| c.join().unwrap()).collect();
        claims
            .into_iter()
            .filter_map(Result::ok)
            .collect::<Vec<_>>()
    });
    assert_eq!(won.len(), 1);
    let owner = std::fs::read_to_string(root.dir.join(NAMES).join("web")).unwrap();
    assert_eq!(won[0].path().file_name().unwrap().to_str().unwrap(), owner);
    // The losers left nothing, and the winner's name among it.
    assert_eq!(root.containers().unwrap().len(), 1);
}

#[test]
fn reclaim_dead_with_one_that_resists_tidies_up_the_others() {
    let (dir, root) = root();
    let sandbox = root.create(&meta("aaa", "a", true)).unwrap();
    // A directory where a file is expected can't be deleted.
    let resists = dir.path().join("resists");
    std::fs::create_dir(&resists).unwrap();
    let taken = Taken::File { path: resists };
    sandbox.journal().record(&taken).unwrap();
    drop(sandbox);
    for id in ["bbb", "ccc"] {
        drop(root.create(&meta(id, id, true)).unwrap());
    }

    let errors = root.reclaim_dead().unwrap();

    assert_eq!(errors.len(), 1);
    assert_eq!(root.containers().unwrap().len(), 1);
}

#[test]
fn remove_of_a_running_container_needs_force() {
    let (_dir, root) = root();
    let sandbox = root.create(&meta("aaa", "a", false)).unwrap();
    let container = root.find("aaa").unwrap();
    let refused = root.remove(&container, false, false);
    assert!(matches!(refused, Err(StateError::Running(_))));
    drop(sandbox);
    root.remove(&container, false, false).unwrap();
}

#[test]
fn volumes_without_a_name_go_with_a_container_that_goes_away() {
    let (dir, root) = root();
    let volumes = volume::Volumes::of(dir.path());
    let with = |id: &str, auto_remove| {
        let new = volume::New {
            name: format!("volume-of-{id}"),
            size: crate::scratch::MIN_SIZE,
            ..Default::default()
        };
        let made = volumes.ensure(&new).unwrap();
        let sandbox = root.create(&meta(id, id, auto_remove)).unwrap();
        let path = made.dir.clone();
        sandbox.journal().record(&Taken::Volume { path }).unwrap();
        sandbox.write_status(&Status::default()).unwrap();
        (sandbox, made.dir)
    };
    let (gone, its) = with("aaa", true);
    gone.remove().unwrap();
    assert!(!its.exists());
    let (kept, its) = with("bbb", false);
    drop(kept);
    root.remove(&root.find("bbb").unwrap(), false, false)
        .unwrap();
    assert!(its.exists());
    let (kept, its) = with("ccc", false);
    drop(kept);
    root.remove(&root.find("ccc").unwrap(), false, true)
        .unwrap();
    assert!(!its.exists());
}

#[test]
fn find_with_ambiguous_prefix_says_so() {
    let (_dir, root) = root();
    let _a = root.create(&meta("abc1", "x", false)).unwrap();
    let _b = root.create(&meta("abc2", "y", false)).unwrap();
    assert!(matches!(root.find("abc"), Err(StateError::Ambiguous(_))));
    assert!(matches!(root.find("zzz"), Err(StateError::NotFound(_))));
    assert_eq!(root.find("abc2").unwrap().meta.name, "y");
}

#[test]
fn open_of_a_directory_others_may_write_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o777)).unwrap();
    let refused = StateRoot::open(&state, "default");
    assert!(matches!(refused, Err(StateError::Untrusted(_))));
}
